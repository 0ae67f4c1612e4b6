// The Python module of the CUDA kernels.
#include "../bindings.h"

#include "step.h"

namespace fused_optim {
namespace {

void require_launched(int error, const std::string& rule) {
  require_rule(error != kUnknownRule, rule);
  if (error != 0)
    throw std::runtime_error(std::string("the CUDA step could not be launched: ") + cuda_error_text(error));
}

// A launch blocks while the device's queue is full, so it runs without the GIL.
template <class F>
int without_gil(F&& launch) {
  py::gil_scoped_release release;
  return launch();
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  add_identity(m);
  add_rules(m);
  add_arrays(m);

  m.def("step", [](const std::string& rule, const Arrays& arrays, int64_t grad_scale, int64_t found_inf,
                   int64_t squares, int64_t stream, int device) {
    const Tables t = with_scaling(arrays, grad_scale, found_inf, squares);
    require_launched(without_gil([&] { return launch_step_cuda(rule.c_str(), t, pointer<void>(stream), device); }),
                     rule);
  });
  m.def("apply_update", [](const std::string& rule, const Arrays& arrays, int64_t stream, int device) {
    const auto launch = [&] {
      return launch_apply_update_cuda(rule.c_str(), arrays.tables, pointer<void>(stream), device);
    };
    require_launched(without_gil(launch), rule);
  });
  m.def("squares", [](const Arrays& arrays, int64_t out, int64_t stream, int device) {
    const auto launch = [&] {
      return launch_squares_cuda(arrays.tables, pointer<double>(out), pointer<void>(stream), device);
    };
    require_launched(without_gil(launch), "");
  });
  m.def("scale", [](const Arrays& arrays, int64_t squares, int64_t stream, int device) {
    const Tables t = with_scaling(arrays, 0, 0, squares);
    require_launched(without_gil([&] { return launch_scale_cuda(t, pointer<void>(stream), device); }), "");
  });
}

}  // namespace fused_optim
