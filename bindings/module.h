// What each file of this folder adds to the Python module.
#pragma once

#include <pybind11/pybind11.h>

void register_layers(pybind11::module_& m);
void register_pages(pybind11::module_& m);
void register_paged_attention(pybind11::module_& m);
void register_policy_loss(pybind11::module_& m);
void register_sample_from_hidden(pybind11::module_& m);
void register_sampling(pybind11::module_& m);
void register_vision_prune(pybind11::module_& m);
