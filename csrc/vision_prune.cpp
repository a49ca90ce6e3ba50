#include "vision_prune.cuh"

#include "vision_prune_maxmin.cuh"

namespace foveate {

void select_topk(const TopkArguments& arguments, OnHost) {
    const std::int64_t spans = arguments.spans.count;
    select_topk(arguments, HostRun{spans ? arguments.total / spans : 0});
}

std::int64_t maxima_elements(std::int64_t tokens) {
    return CosineTile::sides(tokens) * tokens;
}

std::int64_t choice_elements(std::int64_t tokens) {
    return 2 * ChoiceTile::tiles(tokens);
}

void select_maxmin(const MaxminArguments& arguments, const std::vector<LongSpan>& spans, OnHost) {
    select_maxmin(arguments, spans, HostRun{CosineTile::kTile * arguments.dim});
}

void copy_rows(const CopyArguments& arguments, OnHost) {
    copy_rows(arguments, HostRun{arguments.planes[0].row_bytes});
}

}  // namespace foveate
