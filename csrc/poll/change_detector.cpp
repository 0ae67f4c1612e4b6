#include "change_detector.h"

#include <algorithm>

#include "../tables.h"

namespace fused_optim {
namespace {

// A function of the package, for rare cases that are handled in Python.
py::object python(const char* module, const char* function) {
  return py::module_::import((std::string("fused_optim.engine.") + module).c_str()).attr(function);
}

bool is_spread(py::handle tensor) { return python("dtensor", "is_sharded")(tensor).cast<bool>(); }

const void* address_of(const py::object& number) { return reinterpret_cast<const void*>(number.cast<uintptr_t>()); }

Hint hint_of(py::handle tensor) {
  return {tensor.ptr(), address_of(tensor.attr("_cdata")), address_of(tensor.attr("untyped_storage")().attr("_cdata"))};
}

void prefetch_tensor(const Hint& hint) {
  __builtin_prefetch(hint.object);
  // torch's TensorImpl spans three or four cache lines: the storage is near its start; numel, dtype and flags are near
  // its end.
  prefetch_lines(static_cast<const char*>(hint.impl), 4);
  __builtin_prefetch(static_cast<const char*>(hint.storage) + 16);
}

bool has_no_elements(const DlTensor& tensor) {
  return std::find(tensor.shape, tensor.shape + tensor.ndim, 0) != tensor.shape + tensor.ndim;
}

DlTensor described(py::handle tensor) {
  DlTensor seen;
  if (!describe(tensor.ptr(), seen))
    throw py::buffer_error("torch cannot describe a tensor by DLPack: " +
                           std::string(py::str(py::type::handle_of(tensor))));
  return seen;
}

DlType type_of(const py::object& dtype) {
  const py::module_ torch = py::module_::import("torch");
  const py::object example = torch.attr("empty")(0, py::arg("dtype") = dtype, py::arg("device") = "cpu");
  return described(example).dtype;
}

}  // namespace

ChangeDetector::ChangeDetector(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
                               const std::vector<std::string>& deciding, py::object raw, py::object lr)
    : groups_(std::move(groups), columns, deciding, std::move(raw), std::move(lr)), states_(std::move(state)) {
  const py::module_ torch = py::module_::import("torch");
  tensor_class_ = torch.attr("Tensor");
  parameter_class_ = torch.attr("nn").attr("Parameter");
  increment_version_ = torch.attr("autograd").attr("graph").attr("increment_version");
  stepped_ = py::none();
}

void ChangeDetector::add_pending(py::object param) { pending_.push_back(std::move(param)); }

void ChangeDetector::add_guarded(py::object tensor) {
  versions_.push_back(version_of_tensor(tensor));
  guarded_.push_back(std::move(tensor));
}

int64_t ChangeDetector::version_of_tensor(const py::object& tensor) const {
  return PyLong_AsLongLong(version_(tensor.ptr()).ptr());
}

void ChangeDetector::add_row(py::object param, py::object target, py::dict state, py::object grad_dtype,
                             py::object grads, int64_t number) {
  PolledRow row{};
  row.param = param.ptr();
  row.grad_slot = static_cast<int64_t*>(described(grads).data) + number;
  row.grad_dtype = type_of(grad_dtype);
  row.first_place = static_cast<int>(places_.size());
  row.param_type = Py_TYPE(param.ptr());
  row.spread = is_spread(param);
  const DlTensor seen = described(target);
  row.device = seen.device;
  row.ndim = seen.ndim;
  row.layout = add_layout(seen, rows_.empty() ? 0 : rows_.back().layout);
  row.target = std::move(target);
  add_place(param);
  for (const auto& item : state) {
    if (PyObject_IsInstance(item.second.ptr(), tensor_class_.ptr()) == 1) add_place(item.second);
  }
  row.places = static_cast<int>(places_.size()) - row.first_place;
  alive_.push_back(std::move(param));
  states_.add(std::move(state));
  alive_.push_back(std::move(grads));
  rows_.push_back(std::move(row));
  stepped_ = py::none();
}

// The position of these sizes and strides in layouts_. The guess is the layout of the tensor before, because states
// usually have the layout of their param.
size_t ChangeDetector::add_layout(const DlTensor& tensor, size_t guess) {
  const size_t bytes = tensor.ndim * sizeof(int64_t), end = guess + 2 * tensor.ndim;
  if (tensor.ndim == 0) return 0;
  if (end <= layouts_.size() && std::memcmp(layouts_.data() + guess, tensor.shape, bytes) == 0 &&
      std::memcmp(layouts_.data() + guess + tensor.ndim, tensor.strides, bytes) == 0) {
    return guess;
  }
  const size_t made = layouts_.size();
  layouts_.insert(layouts_.end(), tensor.shape, tensor.shape + tensor.ndim);
  layouts_.insert(layouts_.end(), tensor.strides, tensor.strides + tensor.ndim);
  return made;
}

void ChangeDetector::add_place(py::handle object) {
  if (is_spread(object)) {
    object = states_.add_shard(object);
  }
  const DlTensor seen = described(object);
  const size_t guess = places_.empty() ? 0 : places_.back().layout;
  places_.push_back({hint_of(object), seen.address(), seen.ndim, seen.dtype, bits_of(object.ptr(), seen.dtype),
                     add_layout(seen, guess)});
  alive_.push_back(py::reinterpret_borrow<py::object>(object));
}

int ChangeDetector::bits_of(PyObject* tensor, DlType dtype) const {
  return dtype.code == kDlComplex ? is_conj_(tensor) + 2 * is_neg_(tensor) : 0;
}

bool ChangeDetector::same(const Place& place) const {
  DlTensor seen;
  PyObject* const object = const_cast<PyObject*>(static_cast<const PyObject*>(place.hint.object));
  if (!describe(object, seen) || bits_of(object, seen.dtype) != place.bits) return false;
  if (seen.address() != place.data || seen.ndim != place.ndim || !(seen.dtype == place.dtype)) return false;
  const int64_t *shape = layouts_.data() + place.layout, *strides = shape + place.ndim;
  for (int d = 0; d < place.ndim; ++d) {
    if (seen.shape[d] != shape[d] || seen.strides[d] != strides[d]) return false;
  }
  return true;
}

int ChangeDetector::poll() {
  int answer = 0;
  held_.clear();
  held_.reserve(rows_.size());
  if (!groups_.poll(answer)) return kRebuild;
  for (const py::object& param : pending_) {
    if (!grad_(param.ptr()).is_none()) return kRebuild;
  }
  if (!states_.poll()) return kRebuild;
  for (size_t i = 0; i < guarded_.size(); ++i) {
    if (version_of_tensor(guarded_[i]) != versions_[i]) return kRebuild;
  }
  for (size_t ahead = 0; ahead < kAhead; ++ahead) prefetch(ahead);
  for (size_t number = 0; number < rows_.size(); ++number) {
    prefetch(number + kAhead);
    PolledRow& row = rows_[number];
    if (!states_.poll(number) || !poll_places(row) || !poll_grad(row, answer)) return kRebuild;
  }
  return answer;
}

void ChangeDetector::prefetch(size_t number) const {
  if (number >= rows_.size()) return;
  const PolledRow& row = rows_[number];
  for (int i = 0; i < row.places; ++i) prefetch_tensor(places_[row.first_place + i].hint);
  prefetch_tensor(row.grad);
  states_.prefetch(number);
}

bool ChangeDetector::poll_places(const PolledRow& row) const {
  for (int i = 0; i < row.places; ++i) {
    if (!same(places_[row.first_place + i])) return false;
  }
  return true;
}

// The shard of a gradient that matches the param's shard; None if the gradient does not match. Gradients are new
// DTensors at every step, but their specs are usually the same objects. Python handles shards that are still being
// communicated or have other placements.
py::object ChangeDetector::shard_of_grad(PolledRow& row, py::object grad) const {
  const py::object spec = attribute(grad.ptr(), name_of_spec());
  const py::object shard = attribute(grad.ptr(), name_of_shard());
  if (spec.ptr() == row.spec.ptr() && Py_TYPE(shard.ptr()) == Py_TYPE(row.target.ptr())) return shard;
  const py::object whole = py::reinterpret_borrow<py::object>(row.param);
  for (const char* name : {"shape", "dtype", "device"}) {
    if (!grad.attr(name).equal(whole.attr(name))) return py::none();
  }
  const py::object found = python("dtensor", "local_grad")(whole, grad);
  if (found.ptr() == shard.ptr()) row.spec = spec;
  return found;
}

// Whether the numbers in memory are the tensor's values.
bool ChangeDetector::plain(PyObject* tensor, const DlTensor& seen) const {
  if ((seen.dtype.code == kDlComplex && is_conj_(tensor)) || is_neg_(tensor)) return false;
  return seen.data != nullptr || has_no_elements(seen);  // else it is one of torch's zero tensors, without memory
}

// Whether a gradient has the memory layout of the target. Strides of dimensions with one element do not matter, nor do
// any strides of a tensor without elements.
bool ChangeDetector::fits_target(const PolledRow& row, const DlTensor& grad) const {
  const int64_t* strides = layouts_.data() + row.layout + row.ndim;
  bool same = true;
  for (int d = 0; d < row.ndim; ++d) {
    if (grad.shape[d] == 0) return true;
    same &= grad.strides[d] == strides[d] || grad.shape[d] == 1;
  }
  return same;
}

bool ChangeDetector::poll_grad(PolledRow& row, int& answer) {
  py::object grad = grad_(row.param);
  int64_t address = 0;
  DlTensor seen{};
  if (!grad.is_none()) {
    PyTypeObject* type = Py_TYPE(grad.ptr());
    const bool usual = type == reinterpret_cast<PyTypeObject*>(tensor_class_.ptr()) ||
                       type == reinterpret_cast<PyTypeObject*>(parameter_class_.ptr());
    if (!usual || row.spread) {
      const bool spread = type == row.param_type ? row.spread : is_spread(grad);
      if (spread != row.spread) return false;
      if (row.spread) grad = shard_of_grad(row, std::move(grad));
      else if (python("validation", "is_wrapper")(grad).cast<bool>()) return false;
    }
    if (grad.is_none() || !describe(grad.ptr(), seen)) return false;
    if (!(seen.dtype == row.grad_dtype) || !(seen.device == row.device) || seen.ndim != row.ndim) return false;
    const int64_t* shape = layouts_.data() + row.layout;
    for (int d = 0; d < row.ndim; ++d) {
      if (seen.shape[d] != shape[d]) return false;
    }
    if (seen.data == nullptr && !has_no_elements(seen) && !grad.attr("_is_zerotensor")().cast<bool>()) return false;
    if (!plain(grad.ptr(), seen) || !fits_target(row, seen)) {
      grad = python("changes", "laid_out_as")(grad, row.target);
      if (!describe(grad.ptr(), seen)) return false;
    }
    address = reinterpret_cast<int64_t>(seen.address());
    if (address == 0) address = kEmpty;
  }
  if (*row.grad_slot != address) {
    if ((*row.grad_slot == 0) != (address == 0)) stepped_ = py::none();
    // torch stores a tensor's sizes inside its TensorImpl, after the first cache line.
    if (address != 0) row.grad = {grad.ptr(), reinterpret_cast<const char*>(seen.shape) - 72, nullptr};
    *row.grad_slot = address;
    answer |= kGradsMoved;
  }
  if (address != 0) held_.push_back(std::move(grad));
  return true;
}

void ChangeDetector::done() {
  held_.clear();
  if (stepped_.is_none()) {
    py::list params;
    const auto add = [&](py::handle tensor) {
      if (!tensor.attr("is_inference")().cast<bool>()) params.append(tensor);
    };
    for (const PolledRow& row : rows_) {
      if (*row.grad_slot != 0) add(row.param);
    }
    for (const Shard& entry : states_.shards()) add(entry.shard);
    stepped_ = params;
  }
  increment_version_(stepped_);
  for (size_t i = 0; i < guarded_.size(); ++i) versions_[i] = version_of_tensor(guarded_[i]);
}

}  // namespace fused_optim
