// foveate._C: one register_<name>(m) per file of csrc/ that has kernels. It links neither libtorch nor
// anything of torch.
#include "module.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
#if defined(__AVX2__) && defined(__FMA__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("bmi2")) {
        throw py::import_error(
            "foveate._C was built for processors with AVX2, FMA and BMI2 (x86-64-v3), which this one lacks: "
            "install foveate again with FOVEATE_CPU_FLAGS= (empty)");
    }
#endif
    m.doc() = "Native parts of foveate: the page pool and the kernels on CPU and GPU.";
#if defined(__clang__)
    m.attr("COMPILER") = __VERSION__;
#else
    m.attr("COMPILER") = "GCC " __VERSION__;
#endif
#if defined(FOVEATE_WITH_CUDA)
    m.attr("CUDA_VERSION") = FOVEATE_WITH_CUDA;  // that of nvcc
    m.attr("CUDA_ARCHS") = FOVEATE_CUDA_ARCHS;   // chips the kernels were compiled for
#else
    m.attr("CUDA_VERSION") = py::none();
    m.attr("CUDA_ARCHS") = "";
#endif
    register_layers(m);
    register_pages(m);
    register_paged_attention(m);
    register_policy_loss(m);
    register_sample_from_hidden(m);
    register_sampling(m);
    register_vision_prune(m);
}
