// The module of the change detector that reads tensors through DLPack.
#include "../bindings.h"

#include "change_detector.h"

namespace fused_optim {

PYBIND11_MODULE(_poll, m) {
  add_identity(m);
  // Throws if this torch lacks something that the change detector calls.
  m.def("check", [] {
    exchange();
    Getter{"grad"};
    Question{"is_conj"};
    Question{"is_neg"};
  });
  py::class_<ChangeDetector>(m, "ChangeDetector", py::module_local())
      .def(py::init<py::list, py::dict, const std::vector<ColumnSpec>&, const std::vector<std::string>&, py::object,
                    py::object>())
      .def("add_pending", &ChangeDetector::add_pending)
      .def("add_row", &ChangeDetector::add_row)
      .def("add_guarded", &ChangeDetector::add_guarded)
      .def("poll", &ChangeDetector::poll)
      .def("done", &ChangeDetector::done)
      .def("versions", &ChangeDetector::versions);
}

}  // namespace fused_optim
