#include "watch.h"

#include <ATen/Functions.h>
#include <c10/core/GradMode.h>

namespace fused_optim {
namespace {

const at::Tensor& unpack(py::handle object) { return THPVariable_Unpack(object.ptr()); }

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

// A number that changes whenever a dict does (PEP 509): one cache line to look at in place of ten. 0 where this Python
// has none; the dicts are then compared entry by entry.
#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
constexpr bool kVersions = true;
#else
constexpr bool kVersions = false;
#endif
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

bool unchanged(PyObject* dict, uint64_t version) { return kVersions && version_of(dict) == version; }

constexpr size_t kAhead = 12;  // rows, or groups

void prefetch_lines(const void* object, int lines) {
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(object) + 64 * line);
}

void prefetch_tensor(const void* impl, const void* storage) {
  // Of a TensorImpl's three lines or four: the storage stands near its begin, numel, dtype and flags near its end.
  __builtin_prefetch(static_cast<const char*>(impl) + 16);
  __builtin_prefetch(static_cast<const char*>(impl) + 160);
  __builtin_prefetch(static_cast<const char*>(storage) + 16);
}

}  // namespace

Watch::Watch(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
             const std::vector<std::string>& deciding, at::Tensor raw, at::Tensor lr)
    : groups_(std::move(groups)), state_(std::move(state)), raw_(std::move(raw)), lr_(std::move(lr)) {
  for (const auto& item : state_) states_.push_back(py::reinterpret_borrow<py::object>(item.second));
  for (const auto& [key, first, count, optional, is_switch] : columns)
    columns_.push_back({py::str(key), first, count, optional, is_switch});
  deciding_.push_back(py::str("params"));
  for (const std::string& key : deciding) deciding_.push_back(py::str(key));
  const double* made = raw_.const_data_ptr<double>();
  if (raw_.numel() != 0) defaults_.assign(made, made + kRawWidth);
  for (py::handle handle : groups_) {
    WatchedGroup watched{py::reinterpret_borrow<py::object>(handle),
                         py::list(),
                         items_.size(),
                         0,
                         members_.size(),
                         0,
                         0,
                         false,
                         nullptr,
                         nullptr};
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(handle.ptr(), &position, &key, &value)) {
      items_.push_back(py::reinterpret_borrow<py::object>(key));
      items_.push_back(py::reinterpret_borrow<py::object>(value));
    }
    watched.params = py::cast<py::list>(py::cast<py::dict>(handle)["params"]);
    watched.keys = reinterpret_cast<PyDictObject*>(handle.ptr())->ma_keys;
    watched.param_array = reinterpret_cast<PyListObject*>(watched.params.ptr())->ob_item;
    for (py::handle param : watched.params) members_.push_back(py::reinterpret_borrow<py::object>(param));
    watched.items = items_.size() - watched.first_item;
    watched.members = members_.size() - watched.first_member;
    watched_groups_.push_back(std::move(watched));
    int ignored = 0;
    if (!read_hyperparameters(watched_groups_.size() - 1, ignored)) {
      throw py::value_error(
          "every hyperparameter of a param group must be a number, a one-element tensor, or a tuple of these");
    }
  }
  reading_first_ = false;
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
  if (static_cast<size_t>(PyList_GET_SIZE(groups_.ptr())) != watched_groups_.size()) return kRebuild;
  for (size_t index = 0; index < watched_groups_.size(); ++index) {
    if (index + kAhead < watched_groups_.size()) prefetch_group(watched_groups_[index + kAhead]);
    if (!look_at_group(index, answer)) return kRebuild;
  }
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

void Watch::prefetch_group(const WatchedGroup& group) const {
  __builtin_prefetch(group.group.ptr());
  if (!kVersions) prefetch_lines(group.keys, 5);
  __builtin_prefetch(group.params.ptr());
  __builtin_prefetch(group.param_array);
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

bool Watch::look_at_group(size_t index, int& answer) {
  WatchedGroup& watched = watched_groups_[index];
  if (PyList_GET_ITEM(groups_.ptr(), static_cast<Py_ssize_t>(index)) != watched.group.ptr()) return false;

  bool changed = watched.volatile_values;
  if (!unchanged(watched.group.ptr(), watched.version)) {
    watched.version = version_of(watched.group.ptr());
    PyObject *key, *value;
    Py_ssize_t position = 0;
    size_t i = 0;
    while (PyDict_Next(watched.group.ptr(), &position, &key, &value)) {
      if (i == watched.items || items_[watched.first_item + i].ptr() != key) return false;
      py::object& item = items_[watched.first_item + i + 1];
      if (item.ptr() != value) {
        for (const py::str& decides : deciding_) {
          if (PyUnicode_Compare(decides.ptr(), key) == 0) return false;
        }
        item = py::reinterpret_borrow<py::object>(value);
        changed = true;
      }
      i += 2;
    }
    if (i != watched.items) return false;
  }

  if (static_cast<size_t>(PyList_GET_SIZE(watched.params.ptr())) != watched.members) return false;
  for (size_t m = 0; m < watched.members; ++m) {
    if (PyList_GET_ITEM(watched.params.ptr(), static_cast<Py_ssize_t>(m)) != members_[watched.first_member + m].ptr()) {
      return false;
    }
  }
  return !changed || read_hyperparameters(index, answer);
}

bool Watch::read_hyperparameters(size_t index, int& answer) {
  WatchedGroup& watched = watched_groups_[index];
  double* raw = raw_.mutable_data_ptr<double>() + index * kRawWidth;
  int64_t* lr = lr_.mutable_data_ptr<int64_t>() + index;
  watched.volatile_values = false;

  auto set = [&](int column, double number) {
    if (raw[column] != number) {
      raw[column] = number;
      answer |= kRawChanged;
    }
    return true;
  };
  auto put = [&](PyObject* value, int column) {
    if (THPVariable_Check(value)) {
      watched.volatile_values = true;
      const at::Tensor& tensor = unpack(value);
      if (!tensor.is_cpu()) {  // read where it lies, by prep: asking for its value would wait for the device
        const bool wide = tensor.scalar_type() == at::kDouble;
        if (column != kLr || !(wide || tensor.scalar_type() == at::kFloat)) return false;
        const int64_t address = reinterpret_cast<int64_t>(tensor.unsafeGetTensorImpl()->data()) | (wide ? 1 : 0);
        if (*lr != address) answer |= kRawChanged;
        *lr = address;
        return true;
      }
    }
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    if (column == kLr && *lr != 0) {
      *lr = 0;
      answer |= kRawChanged;
    }
    return set(column, number);
  };

  for (const auto& [key, first, count, optional, is_switch] : columns_) {
    PyObject* value = PyDict_GetItemWithError(watched.group.ptr(), key.ptr());
    const bool was_on = raw[first] != 0.0;
    if (optional && (value == nullptr || value == Py_None)) {
      for (int column = first; column < first + count; ++column) set(column, defaults_[column]);
    } else if (value == nullptr) {
      return false;
    } else if (PyTuple_Check(value) || PyList_Check(value)) {
      watched.volatile_values |= PyList_Check(value);
      if (PySequence_Fast_GET_SIZE(value) != count) return false;
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
        if (!put(PySequence_Fast_GET_ITEM(value, i), first + static_cast<int>(i))) return false;
      }
    } else if (count != 1 || !put(value, first)) {
      return false;
    }
    if (is_switch && !reading_first_ && (raw[first] != 0.0) != was_on) return false;
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
