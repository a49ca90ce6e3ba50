#include "paged_attention.h"

#include <pybind11/pybind11.h>

#include "arguments.h"
#include "module.h"
#include "run.h"

namespace py = pybind11;
using namespace foveate;

namespace {

const DTypes kInt32 = {DType::int32};

const std::int32_t* integers_of(const Tensor& tensor) {
    return static_cast<const std::int32_t*>(tensor.data);
}

// The numbers in pages, tiles, rows, row_parts and part_offsets are taken as they are: whoever makes them
// checks them, once a step.
void attend(py::handle queries_, py::handle key_pool_, py::handle value_pool_, py::handle pages_,
            py::handle tiles_, py::handle rows_, py::handle row_parts_, py::handle part_offsets_,
            py::handle workspace_, py::handle out_, double scale, std::uintptr_t stream) {
    Arguments check;
    const Tensor out = check.tensor(out_, "out", {"T", "heads", "D"}, kFloating);
    const Tensor queries = check.tensor(queries_, "queries", {"T", "heads", "D"}, {out.dtype}, Layout::rows);
    const auto pool = [&](py::handle value, const char* name) {
        return check.tensor(value, name, {"pages", "page_size", "kv_heads", "D"}, {out.dtype});
    };
    const Tensor keys = pool(key_pool_, "key_pool"), values = pool(value_pool_, "value_pool");
    DecodeArguments a{};
    a.dtype = out.dtype;
    a.queries = queries.data;
    a.row_stride = queries.strides[0];
    a.head_stride = queries.strides[1];
    a.keys = keys.data;
    a.values = values.data;
    a.pages = integers_of(check.tensor(pages_, "pages", {"visited pages"}, kInt32));
    a.tiles = static_cast<const AttentionTile*>(check.tensor(tiles_, "tiles", {"tiles", "6"}, kInt32).data);
    a.rows = integers_of(check.tensor(rows_, "rows", {"visiting rows"}, kInt32));
    a.row_parts = integers_of(check.tensor(row_parts_, "row_parts", {"visiting rows"}, kInt32));
    a.part_offsets = integers_of(check.tensor(part_offsets_, "part_offsets", {"T + 1"}, kInt32));
    a.workspace = static_cast<float*>(
        check.tensor(workspace_, "workspace", {"parts", "heads", "D + 2"}, {DType::float32}).data);
    a.out = out.data;
    a.num_tiles = check.size("tiles");
    a.num_parts = check.size("parts");
    a.num_rows = check.size("T");
    a.heads = check.size("heads");
    a.kv_heads = check.size("kv_heads");
    a.head_dim = check.size("D");
    a.page_size = check.size("page_size");
    a.scale = static_cast<float>(scale);
    const auto fits = [](std::int64_t size, std::int64_t wanted, const char* name) {
        if (size != wanted) throw bad_value("size " + std::to_string(wanted), std::to_string(size), name);
    };
    fits(check.size("6"), sizeof(AttentionTile) / sizeof(std::int32_t), "tiles");
    fits(check.size("T + 1"), a.num_rows + 1, "part_offsets");
    fits(check.size("D + 2"), a.head_dim + 2, "workspace");
    if (a.head_dim > kMaxHeadDim) {
        throw bad_value("head_dim <= " + std::to_string(kMaxHeadDim), std::to_string(a.head_dim), "queries");
    }
    if (a.kv_heads == 0 || a.heads % a.kv_heads != 0) {
        throw bad_value("heads a multiple of " + std::to_string(a.kv_heads), std::to_string(a.heads),
                        "queries");
    }
    run_on(check.device(), stream, [&](auto where) { decode_attention(a, where); });
}

}  // namespace

void register_paged_attention(py::module_& m) {
    m.def("decode_attention", &attend, py::arg("queries"), py::arg("key_pool"), py::arg("value_pool"),
          py::arg("pages"), py::arg("tiles"), py::arg("rows"), py::arg("row_parts"), py::arg("part_offsets"),
          py::arg("workspace"), py::arg("out"), py::arg("scale"), py::arg("stream") = 0);
    m.attr("ATTENTION_CHUNK_KEYS") = kChunkKeys;
    m.attr("ATTENTION_TILE_COLUMNS") = kTileColumns;
    m.attr("ATTENTION_MAX_HEAD_DIM") = kMaxHeadDim;
}
