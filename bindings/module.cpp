// foveate._C: one register_<family>(m) per family of csrc/. It links neither libtorch nor anything of torch.
#include "module.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native parts of foveate: the page pool.";
    register_pages(m);
}
