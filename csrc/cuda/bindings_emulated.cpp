// The Python module of the emulated CUDA kernels.
#include "../bindings.h"
#include "step.h"

namespace fused_optim {

PYBIND11_MODULE(_cuda_emulated, m) {
  add_identity(m);
  add_rules(m);
  add_arrays(m);

  m.def("step", [](const std::string& rule, const Arrays& arrays, int64_t grad_scale, int64_t found_inf,
                   int64_t squares) {
    require_rule(launch_step_emulated(rule.c_str(), with_scaling(arrays, grad_scale, found_inf, squares)) == 0, rule);
  });
  m.def("apply_update", [](const std::string& rule, const Arrays& arrays) {
    launch_apply_update_emulated(rule.c_str(), arrays.tables);
  });
  m.def("squares",
        [](const Arrays& arrays, int64_t out) { launch_squares_emulated(arrays.tables, pointer<double>(out)); });
  m.def("scale",
        [](const Arrays& arrays, int64_t squares) { launch_scale_emulated(with_scaling(arrays, 0, 0, squares)); });
}

}  // namespace fused_optim
