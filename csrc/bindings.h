// Shared by the modules of the kernels: Python passes a table as the addresses of its arrays.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "rules.h"
#include "tables.h"

namespace fused_optim {

namespace py = pybind11;

// fused_optim/engine/modules.py compares these with the values in the Python files before it uses a module.
inline void add_identity(py::module_& m) {
  m.attr("VERSION") = FUSED_OPTIM_VERSION;
  py::dict layout;
  for (const LayoutEntry& entry : kLayout) layout[entry.name] = entry.number;
  m.attr("LAYOUT") = layout;
}

// fused_optim/backends/native.py compares the names with those of the rules in Python.
inline void add_rules(py::module_& m) {
  py::list names;
  AllRules::each([&](auto rule) { names.append(decltype(rule)::type::name); });
  m.attr("RULES") = py::tuple(names);
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// One table, made once and used at every step. The caller keeps the memory alive.
struct Arrays {
  Tables tables;
  int64_t elements;
};

inline Arrays make_arrays(const std::vector<int64_t>& addresses, int64_t chunks, int32_t tensors, int64_t elements,
                          bool ema, bool packed) {
  if (addresses.size() != kArrayWidth)
    throw py::value_error("a table has " + std::to_string(kArrayWidth) + " arrays, but got " +
                          std::to_string(addresses.size()));
  Tables t{};
  t.chunk_table = pointer<const int64_t>(addresses[kArrayChunkTable]);
  t.rows = pointer<const int64_t>(addresses[kArrayRows]);
  t.grads = pointer<const int64_t>(addresses[kArrayGrads]);
  t.lr = pointer<const int64_t>(addresses[kArrayLr]);
  t.group_hparams = pointer<const double>(addresses[kArrayGroupHparams]);
  t.group_index = pointer<const int32_t>(addresses[kArrayGroupIndex]);
  t.tensor_scalars = pointer<double>(addresses[kArrayTensorScalars]);
  t.row_offsets = pointer<const int64_t>(addresses[kArrayRowOffsets]);
  t.partials = pointer<double>(addresses[kArrayPartials]);
  t.sums = pointer<double>(addresses[kArraySums]);
  t.trust = pointer<double>(addresses[kArrayTrust]);
  t.chunks = chunks;
  t.tensors = tensors;
  t.ema = ema;
  t.packed = packed;
  return {t, elements};
}

inline void add_arrays(py::module_& m) {
  py::class_<Arrays>(m, "Arrays", py::module_local())
      .def(py::init(&make_arrays), py::arg("addresses"), py::arg("chunks"), py::arg("tensors"), py::arg("elements"),
           py::arg("ema"), py::arg("packed"));
}

// Arguments of one step: the address of one number each, in the memory of the table's device, or 0.
inline Tables with_scaling(const Arrays& arrays, int64_t grad_scale, int64_t found_inf, int64_t squares) {
  Tables t = arrays.tables;
  t.grad_scale = pointer<const float>(grad_scale);
  t.found_inf = pointer<const float>(found_inf);
  t.squares = pointer<const double>(squares);
  return t;
}

inline void require_rule(bool found, const std::string& rule) {
  if (!found)
    throw py::value_error("the compiled module has no rule \"" + rule +
                          "\"; install fused_optim again (pip install .) so that it matches the Python files");
}

}  // namespace fused_optim
