// The module of the look before each step.
#include "../bindings.h"

#include "watch.h"

namespace fused_optim {

PYBIND11_MODULE(_poll, m) {
  add_identity(m);
  // Throws where this torch does not have what the look calls.
  m.def("check", [] {
    exchange();
    Getter{"grad"};
    Getter{"_version"};
    Question{"is_conj"};
    Question{"is_neg"};
  });
  py::class_<Watch>(m, "Watch", py::module_local())
      .def(py::init<py::list, py::dict, const std::vector<ColumnSpec>&, const std::vector<std::string>&, py::object,
                    py::object>())
      .def("add_pending", &Watch::add_pending)
      .def("add_row", &Watch::add_row)
      .def("add_guarded", &Watch::add_guarded)
      .def("look", &Watch::look)
      .def("done", &Watch::done)
      .def("versions", &Watch::versions);
}

}  // namespace fused_optim
