// The module of the change detector with torch's headers. It reads tensors by their layout in the torch that it was
// compiled with. So fused_optim/engine/modules.py reads the text kBuiltFor from the file before it loads the module.
#include "../../bindings.h"

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "change_detector.h"

namespace fused_optim {
namespace {

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
[[gnu::used]] const char kBuiltFor[] = "built for torch " TEXT(TORCH_VERSION_MAJOR) "." TEXT(TORCH_VERSION_MINOR) ".";

}  // namespace

PYBIND11_MODULE(_poll_aten, m) {
  add_identity(m);
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
