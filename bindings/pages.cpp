#include "pages.h"

#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <vector>

#include "common/check.h"
#include "module.h"

namespace py = pybind11;

namespace {

// Python ints are unbounded, page ids are not: a number that does not fit is the caller's error, by name.
foveate::PageId to_page_id(std::int64_t value, const char* argument) {
    using Limits = std::numeric_limits<foveate::PageId>;
    if (value >= Limits::min() && value <= Limits::max()) return static_cast<foveate::PageId>(value);
    throw foveate::bad_value("a 32-bit int", std::to_string(value), argument);
}

std::vector<foveate::PageId> to_page_ids(const std::vector<std::int64_t>& values) {
    std::vector<foveate::PageId> pages;
    pages.reserve(values.size());
    for (const std::int64_t value : values) pages.push_back(to_page_id(value, "page"));
    return pages;
}

}  // namespace

void register_pages(py::module_& m) {
    using foveate::PagePool;
    py::register_exception<foveate::OutOfPages>(m, "OutOfPages", PyExc_RuntimeError);
    py::class_<PagePool>(m, "PagePool")
        .def(py::init([](std::int64_t num_pages) { return PagePool(to_page_id(num_pages, "num_pages")); }),
             py::arg("num_pages"))
        .def(
            "allocate", [](PagePool& pool, std::int64_t n) { return pool.allocate(to_page_id(n, "n")); },
            py::arg("n"))
        .def(
            "free",
            [](PagePool& pool, const std::vector<std::int64_t>& pages) { pool.free(to_page_ids(pages)); },
            py::arg("pages"))
        .def(
            "is_used",
            [](const PagePool& pool, std::int64_t page) { return pool.is_used(to_page_id(page, "page")); },
            py::arg("page"))
        .def_property_readonly("num_pages", &PagePool::num_pages)
        .def_property_readonly("num_free", &PagePool::num_free)
        .def_property_readonly("num_used", &PagePool::num_used);
}
