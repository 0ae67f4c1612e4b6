#include "dlpack.h"

namespace fused_optim {

const DlExchange& exchange() {
  static const DlExchange* const table = [] {
    const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    auto* header = static_cast<const DlHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (header == nullptr) throw py::error_already_set();
    while (header != nullptr && header->major != 1) header = header->previous;
    auto* found = reinterpret_cast<const DlExchange*>(header);
    if (found == nullptr || found->describe == nullptr)
      throw std::runtime_error("torch's DLPack exchange table has another major version than 1");
    return found;
  }();
  return *table;
}

namespace {

// The descriptor of an attribute or method of torch's base class of tensors.
py::object descriptor(const char* name) {
  return py::module_::import("torch").attr("_C").attr("TensorBase").attr(name);
}

}  // namespace

Getter::Getter(const char* name) {
  const py::object found = descriptor(name);
  if (Py_TYPE(found.ptr()) != &PyGetSetDescr_Type)
    throw std::runtime_error(std::string("torch's Tensor.") + name + " is not a getter in C");
  const PyGetSetDef* definition = reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
  get_ = definition->get;
  closure_ = definition->closure;
}

py::object Getter::operator()(PyObject* tensor) const {
  PyObject* value = get_(tensor, closure_);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

Question::Question(const char* name) {
  const py::object found = descriptor(name);
  const auto* method = reinterpret_cast<PyMethodDescrObject*>(found.ptr());
  if (Py_TYPE(found.ptr()) != &PyMethodDescr_Type || method->d_method->ml_flags != METH_NOARGS)
    throw std::runtime_error(std::string("torch's Tensor.") + name + " is not a method in C without arguments");
  method_ = method->d_method->ml_meth;
}

bool Question::operator()(PyObject* tensor) const {
  PyObject* value = method_(tensor, nullptr);
  if (value == nullptr) throw py::error_already_set();
  Py_DECREF(value);  // the value is True or False, which are never freed
  return value == Py_True;
}

}  // namespace fused_optim
