// The GPU's Block and conversions against the host's, bit for bit. Needs a GPU; see block_check.cpp for the
// host.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "block_bodies.h"
#include "common/run.cuh"

using namespace foveate;

namespace {

void expect(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "check failed: %s\n", what);
    std::exit(1);
}

void check(cudaError_t error) {
    expect(error == cudaSuccess, cudaGetErrorString(error));
}

// A vector's copy on the GPU for as long as it lives, of its exact size: memcheck sees an access beyond it.
template <class V>
class OnGpu {
  public:
    explicit OnGpu(const std::vector<V>& host) : bytes_(host.size() * sizeof(V)) {
        check(cudaMalloc(&data_, std::max<std::size_t>(bytes_, 1)));
        check(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice));
    }
    ~OnGpu() { cudaFree(data_); }
    OnGpu(const OnGpu&) = delete;
    OnGpu& operator=(const OnGpu&) = delete;

    V* data() const { return static_cast<V*>(data_); }
    std::vector<V> copy() const {
        std::vector<V> host(bytes_ / sizeof(V));
        check(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
        return host;
    }

  private:
    std::size_t bytes_;
    void* data_ = nullptr;
};

template <class V>
bool same_bytes(const std::vector<V>& a, const std::vector<V>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(V)) == 0);
}

template <class T, int kLanes>
void check_block(std::int64_t rows, std::int64_t n, std::int64_t offset) {
    Sample<T> host(rows, n, offset);
    const OnGpu<T> x(host.x), mapped(host.mapped);
    const OnGpu<float> y(host.y);
    const OnGpu<std::int64_t> scanned(host.scanned);
    const OnGpu<RowResults> results(host.results);
    const EveryOperation<T, kLanes> body{x.data(),       y.data(), mapped.data(), scanned.data(),
                                         results.data(), n,        host.stride};
    DeviceRun{"every_operation", 0}(body, rows);
    check(cudaDeviceSynchronize());
    HostRun{1}(host.template body<kLanes>(), rows);
    expect(same_bytes(results.copy(), host.results), "reductions, scan totals and Philox words");
    expect(same_bytes(mapped.copy(), host.mapped), "map, and nothing written between rows");
    expect(same_bytes(scanned.copy(), host.scanned), "scan");
}

template <class T, int kLanes, int W>
void check_products(std::int64_t m, std::int64_t n, std::int64_t stride, std::int64_t first) {
    Factors<T, W> host(m, n, stride, first);
    const OnGpu<T> x(host.x);
    const OnGpu<std::int64_t> offsets(host.offsets);
    const OnGpu<float> y(host.y), rows(host.rows), transposed(host.transposed);
    const Products<T, kLanes, W> body{
        x.data() + first, offsets.data(), y.data(), rows.data(), transposed.data(), m, n, stride};
    DeviceRun{"products", 0}(body, 1);
    check(cudaDeviceSynchronize());
    HostRun{1}(host.template body<kLanes>(), 1);
    expect(same_bytes(rows.copy(), host.rows), "multiply");
    expect(same_bytes(transposed.copy(), host.transposed), "multiply, transposed");
}

template <class T>
struct Convert {
    static constexpr int lanes = 128;
    const float* in;
    T* out;
    float* back;
    std::int64_t n;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t row) const {
        block.for_each(n, [&](std::int64_t i) {
            out[row * n + i] = from_float<T>(in[row * n + i]);
            back[row * n + i] = to_float(T{static_cast<std::uint16_t>(row * n + i)});
        });
    }
};

template <class T>
void check_format() {
    constexpr std::int64_t kRows = 4096, kColumns = 1024;
    std::vector<float> values(kRows * kColumns), back(values.size());
    std::vector<T> halves(values.size());
    std::uint32_t state = 7;
    for (float& value : values) {
        state = state * 1664525u + 1013904223u;
        const float candidate = bits_float(state);
        value = candidate == candidate ? candidate : 1.0f;  // the payload of a NaN may differ
    }
    const OnGpu<float> in(values), gpu_back(back);
    const OnGpu<T> out(halves);
    DeviceRun{"convert", 0}(Convert<T>{in.data(), out.data(), gpu_back.data(), kColumns}, kRows);
    check(cudaDeviceSynchronize());
    HostRun{1}(Convert<T>{values.data(), halves.data(), back.data(), kColumns}, kRows);
    expect(same_bytes(out.copy(), halves), "from_float");
    const std::vector<float> got = gpu_back.copy();
    for (std::size_t i = 0; i < got.size(); ++i) {
        expect(float_bits(got[i]) == float_bits(back[i]) || (got[i] != got[i] && back[i] != back[i]),
               "to_float");
    }
}

}  // namespace

int main() {
    check_format<f16>();
    check_format<bf16>();
    for (const std::int64_t n : {0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1024, 2047, 4099}) {
        for (const std::int64_t offset : {0, 1, 8}) {
            check_block<float, 32>(5, n, offset);
            check_block<float, 128>(5, n, offset);
            check_block<bf16, 32>(5, n, offset);
            check_block<f16, 128>(5, n, offset);
        }
    }
    for_products([](auto... sizes) {
        check_products<float, 128, 16>(sizes...);
        check_products<bf16, 128, 8>(sizes...);
        check_products<f16, 32, 16>(sizes...);
    });
    std::puts("blocks agree");
    return 0;
}
