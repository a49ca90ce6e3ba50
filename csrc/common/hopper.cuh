// Hopper's own instructions, as few as a product with asynchronous copies needs (PTX ISA 8.0, sm_90a):
// barriers in shared memory, copies by tensor maps, matrix instructions of a warpgroup. Addresses are those
// of shared memory, as
// __cvta_generic_to_shared gives them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/scalar.h"

namespace foveate::hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier in shared memory that phases pass through: one is over when `arrivals` threads have arrived and
// all bytes that they announced are there.
__device__ __forceinline__ void start_barrier(std::uint32_t barrier, std::uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes started barriers known to the other thread blocks of a cluster, which must then meet.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(std::uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the barrier that lies at the same address in thread block `rank` of the cluster. With `.release.cluster`
// spelled out, ptxas puts a fence of the whole GPU before it.
__device__ __forceinline__ void arrive_at(std::uint32_t barrier, std::uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void arrive_and_expect(std::uint32_t barrier, std::uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity is over; one that never was counts as that before the first. At most one
// phase may have passed since, as two have the same parity.
__device__ __forceinline__ void wait(std::uint32_t barrier, std::uint32_t parity) {
    std::uint32_t over;
    do {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n"
            "}"
            : "=r"(over)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!over);
}

// Copies a box of a tensor map into shared memory, and its bytes to the barrier's count.
__device__ __forceinline__ void copy_box(std::uint32_t target, const CUtensorMap& map, std::uint32_t barrier,
                                         std::int32_t at0, std::int32_t at1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(at0), "r"(at1)
        : "memory");
}

__device__ __forceinline__ void copy_box(std::uint32_t target, const CUtensorMap& map, std::uint32_t barrier,
                                         std::int32_t at0, std::int32_t at1, std::int32_t at2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(at0), "r"(at1), "r"(at2)
        : "memory");
}

// Likewise into each thread block of the cluster whose bit is set in `ranks`, at the same address and with
// the barrier of each.
__device__ __forceinline__ void copy_box_to(std::uint16_t ranks, std::uint32_t target, const CUtensorMap& map,
                                            std::uint32_t barrier, std::int32_t at0, std::int32_t at1,
                                            std::int32_t at2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(target),
        "l"(&map), "r"(barrier), "h"(ranks), "r"(at0), "r"(at1), "r"(at2)
        : "memory");
}

__device__ __forceinline__ std::uint32_t rank_in_cluster() {
    std::uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the cluster meet; what they wrote before is seen after.
__device__ __forceinline__ void meet_cluster() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The accumulators may be written by the instructions that follow, and were written by those before.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups of products are under way.
template <int kPending>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators across.
__device__ __forceinline__ void hold(float (&d)[128]) {
#pragma unroll
    for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a b^T (+ d where `add`), a [64, 16], b [256, 16]: thread t of the warpgroup holds of row 16 (t / 32) +
// t % 32 / 4 the columns 8 j + 2 (t % 4) + e in d[4 j + e], and of the row 8 below them in d[4 j + 2 + e].
#define FOVEATE_PRODUCT_64_256_16(TYPE)                                                                     \
    asm volatile(                                                                                           \
        "{\n"                                                                                               \
        ".reg .pred add;\n"                                                                                 \
        "setp.ne.b32 add, %130, 0;\n"                                                                       \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                        \
        " {"                                                                                                \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"    \
        "}, %128, %129, add, 1, 1, 0, 0;\n"                                                                 \
        "}"                                                                                                 \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),   \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),          \
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),        \
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),        \
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),        \
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),        \
          "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),        \
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),        \
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),        \
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),        \
          "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]),        \
          "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]),        \
          "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]),        \
          "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]),        \
          "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]),  \
          "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), \
          "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
          "+f"(d[127])                                                                                      \
        : "l"(a), "l"(b), "r"(static_cast<std::uint32_t>(add)))

template <class T>
__device__ __forceinline__ void multiply_64_256_16(float (&d)[128], std::uint64_t a, std::uint64_t b,
                                                   bool add);

template <>
__device__ __forceinline__ void multiply_64_256_16<bf16>(float (&d)[128], std::uint64_t a, std::uint64_t b,
                                                         bool add) {
    FOVEATE_PRODUCT_64_256_16("bf16");
}

template <>
__device__ __forceinline__ void multiply_64_256_16<f16>(float (&d)[128], std::uint64_t a, std::uint64_t b,
                                                        bool add) {
    FOVEATE_PRODUCT_64_256_16("f16");
}

#undef FOVEATE_PRODUCT_64_256_16

#endif

}  // namespace foveate::hopper
