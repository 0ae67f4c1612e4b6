#include "watch.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

#include "../../tables.h"

namespace fused_optim {
namespace {

bool wraps(const at::Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); }

// Interned once, and for ever: what a DTensor keeps its shard and its mesh and placements as.
PyObject* name_of_shard() {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return name;
}
PyObject* name_of_spec() {
  static PyObject* const name = PyUnicode_InternFromString("_spec");
  return name;
}

// Whether it is a DTensor.
bool is_spread(py::handle tensor) {
  return wraps(unpack(tensor)) && PyObject_HasAttr(tensor.ptr(), name_of_shard()) == 1;
}

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// Strides along dimensions of one element say nothing.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (x[d] != y[d] && sizes[d] != 1) return false;
  }
  return true;
}

// Whether the numbers in memory are the tensor's values.
bool plain(const at::Tensor& t) { return !t.is_conj() && !t.is_neg() && !t._is_zerotensor(); }

void prefetch_tensor(const void* impl, const void* storage) {
  // Of a TensorImpl's three lines or four: the storage stands near its begin, numel, dtype and flags near its end.
  __builtin_prefetch(static_cast<const char*>(impl) + 16);
  __builtin_prefetch(static_cast<const char*>(impl) + 160);
  __builtin_prefetch(static_cast<const char*>(storage) + 16);
}

}  // namespace

Watch::Watch(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
             const std::vector<std::string>& deciding, py::object raw, py::object lr)
    : groups_(std::move(groups), columns, deciding, std::move(raw), std::move(lr)), state_(std::move(state)) {
  for (const auto& item : state_) states_.push_back(py::reinterpret_borrow<py::object>(item.second));
}

void Watch::add_pending(py::object param) { pending_.push_back(unpack(param)); }

void Watch::add_row(py::object param, at::Tensor target, py::dict state, at::ScalarType grad_dtype, at::Tensor grads,
                    int64_t number) {
  WatchedRow row{};
  row.param = unpack(param);
  row.target = std::move(target);
  row.state = state.ptr();
  row.grad_slot = grads.mutable_data_ptr<int64_t>() + number;
  row.grad_dtype = grad_dtype;
  row.first_place = static_cast<int>(places_.size());
  row.first_entry = static_cast<int>(entries_.size());
  row.spread = is_spread(param);
  add_place(param);
  for (const auto& item : state) {
    alive_.push_back(py::reinterpret_borrow<py::object>(item.second));
    entries_.push_back(item.second.ptr());
    if (THPVariable_Check(item.second.ptr())) add_place(item.second);
  }
  row.places = static_cast<int>(places_.size()) - row.first_place;
  row.entries = static_cast<int>(entries_.size()) - row.first_entry;
  row.state_keys = reinterpret_cast<PyDictObject*>(row.state)->ma_keys;
  row.autograd_meta = torch::autograd::impl::get_autograd_meta(row.param);
  alive_.push_back(std::move(state));
  alive_tensors_.push_back(std::move(grads));
  rows_.push_back(std::move(row));
}

void Watch::add_place(py::handle object) {
  if (is_spread(object)) {
    shards_.push_back({py::reinterpret_borrow<py::object>(object), attribute(object.ptr(), name_of_shard())});
    object = shards_.back().shard;
  }
  const at::Tensor& tensor = unpack(object);
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  int strides = -1;
  if (!tensor.is_contiguous()) {
    strides = static_cast<int>(strides_.size());
    strides_.push_back(tensor.strides().vec());
  }
  places_.push_back(
      {impl, storage, storage->data(), impl->storage_offset(), impl->numel(), tensor.scalar_type(), strides});
  alive_tensors_.push_back(tensor);
}

bool Watch::same(const Place& place) const {
  const c10::TensorImpl& impl = *place.impl;
  return impl.unsafe_storage().unsafeGetStorageImpl() == place.storage && place.storage->data() == place.data &&
         impl.storage_offset() == place.offset && impl.numel() == place.numel &&
         c10::typeMetaToScalarType(impl.dtype()) == place.dtype && impl.is_contiguous() == (place.strides < 0) &&
         (place.strides < 0 || impl.strides().equals(strides_[place.strides]));
}

int Watch::look() {
  int answer = 0;
  held_.clear();
  held_.reserve(rows_.size());
  if (!groups_.look(answer)) return kRebuild;
  for (const at::Tensor& param : pending_) {
    if (param.grad().defined()) return kRebuild;
  }
  if (!look_at_state() || !look_at_shards()) return kRebuild;
  for (size_t ahead = 0; ahead < kAhead; ++ahead) prefetch(ahead);
  for (size_t number = 0; number < rows_.size(); ++number) {
    prefetch(number + kAhead);
    WatchedRow& row = rows_[number];
    if (!look_at_row(row) || !look_at_grad(row, answer)) return kRebuild;
  }
  return answer;
}

void Watch::prefetch(size_t number) const {
  if (number >= rows_.size()) return;
  const WatchedRow& row = rows_[number];
  for (int i = 0; i < row.places; ++i) {
    const Place& place = places_[row.first_place + i];
    prefetch_tensor(place.impl, place.storage);
  }
  prefetch_tensor(row.grad, row.grad_storage);
  __builtin_prefetch(reinterpret_cast<const char*>(row.grad) + 64);  // sizes
  __builtin_prefetch(row.state);
  __builtin_prefetch(row.autograd_meta);
  if (!kVersions) prefetch_lines(row.state_keys, 2);
}

bool Watch::look_at_state() {
  if (unchanged(state_.ptr(), state_version_)) return true;
  const uint64_t version = version_of(state_.ptr());
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t entries = 0;
  while (PyDict_Next(state_.ptr(), &position, &key, &value)) {
    if (entries == states_.size() || states_[entries++].ptr() != value) return false;
  }
  state_version_ = version;
  return entries == states_.size();
}

bool Watch::look_at_shards() const {
  for (const Shard& entry : shards_) {
    if (attribute(entry.whole.ptr(), name_of_shard()).ptr() != entry.shard.ptr()) return false;
  }
  return true;
}

bool Watch::look_at_row(WatchedRow& row) const {
  if (!unchanged(row.state, row.version)) {
    row.version = version_of(row.state);
    PyObject *key, *value;
    Py_ssize_t position = 0;
    int entries = 0;
    while (PyDict_Next(row.state, &position, &key, &value)) {
      if (entries == row.entries || entries_[row.first_entry + entries++] != value) return false;
    }
    if (entries != row.entries) return false;
  }
  for (int i = 0; i < row.places; ++i) {
    if (!same(places_[row.first_place + i])) return false;
  }
  return true;
}

// The shard of a gradient that goes with the param's. Gradients come as DTensors made anew, but their specs are mostly
// the same objects; a shard that is still on its way, or spread in another way, is a matter for Python.
at::Tensor Watch::shard_of_grad(WatchedRow& row, const at::Tensor& grad) const {
  const auto whole = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  const py::object spec = attribute(whole.ptr(), name_of_spec());
  const py::object shard = attribute(whole.ptr(), name_of_shard());
  if (spec.ptr() == row.spec.ptr() && !wraps(unpack(shard))) return unpack(shard);
  const auto param = py::reinterpret_steal<py::object>(THPVariable_Wrap(row.param));
  const py::module_ shards = py::module_::import("fused_optim.shards");
  const py::object found = shards.attr("local_grad")(param, whole);
  if (found.ptr() == shard.ptr()) row.spec = spec;
  return unpack(found);
}

bool Watch::look_at_grad(WatchedRow& row, int& answer) {
  const at::Tensor& param = row.param;
  const at::Tensor& whole = param.unsafeGetTensorImpl()->grad();
  int64_t address = 0;
  if (whole.defined()) {
    if (whole.scalar_type() != row.grad_dtype || whole.device() != param.device() || whole.sizes() != param.sizes())
      return false;
    if (whole.layout() != at::kStrided || wraps(whole) != row.spread) return false;
    at::Tensor grad = row.spread ? shard_of_grad(row, whole) : whole;
    if (plain(grad) && same_layout(grad, row.target)) {
      held_.push_back(std::move(grad));
    } else {
      c10::NoGradGuard no_grad;
      at::Tensor copy = at::empty_strided(row.target.sizes(), row.target.strides(), grad.options());
      held_.push_back(copy.copy_(grad));
    }
    address = reinterpret_cast<int64_t>(held_.back().unsafeGetTensorImpl()->data());
    if (address == 0) address = kEmpty;
  }
  if (*row.grad_slot != address) {
    if (address != 0) {
      row.grad = held_.back().unsafeGetTensorImpl();
      row.grad_storage = row.grad->unsafe_storage().unsafeGetStorageImpl();
    }
    *row.grad_slot = address;
    answer |= kGradsMoved;
  }
  return true;
}

void Watch::done() {
  held_.clear();
  for (const WatchedRow& row : rows_) {
    if (*row.grad_slot == 0) continue;
    if (!row.param.is_inference()) row.param.unsafeGetTensorImpl()->bump_version();
  }
  for (const Shard& entry : shards_) {
    const at::Tensor& shard = unpack(entry.shard);
    if (!shard.is_inference()) shard.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace fused_optim
