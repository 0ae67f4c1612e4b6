#include "group_changes.h"

#include "../tables.h"

namespace fused_optim {
namespace {

int64_t address_of(py::handle tensor) { return tensor.attr("data_ptr")().cast<int64_t>(); }

void prefetch(const PolledGroup& group) {
  __builtin_prefetch(group.group.ptr());
  if (!kVersions) prefetch_lines(group.keys, 5);
  __builtin_prefetch(group.params.ptr());
  __builtin_prefetch(group.param_array);
}

}  // namespace

GroupChanges::GroupChanges(py::list groups, const std::vector<ColumnSpec>& columns,
                           const std::vector<std::string>& deciding, py::object raw, py::object lr)
    : groups_(std::move(groups)), raw_tensor_(std::move(raw)), lr_tensor_(std::move(lr)) {
  const py::module_ torch = py::module_::import("torch");
  tensor_class_ = torch.attr("Tensor");
  float32_ = torch.attr("float32");
  float64_ = torch.attr("float64");
  raw_ = reinterpret_cast<double*>(address_of(raw_tensor_));
  lr_ = reinterpret_cast<int64_t*>(address_of(lr_tensor_));
  for (const auto& [key, first, count, optional, is_switch] : columns)
    columns_.push_back({py::str(key), first, count, optional, is_switch});
  deciding_.push_back(py::str("params"));
  for (const std::string& key : deciding) deciding_.push_back(py::str(key));
  if (groups_.size() != 0) defaults_.assign(raw_, raw_ + kGroupWidth);
  for (py::handle handle : groups_) {
    PolledGroup polled{py::reinterpret_borrow<py::object>(handle),
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
    polled.params = py::cast<py::list>(py::cast<py::dict>(handle)["params"]);
    polled.keys = reinterpret_cast<PyDictObject*>(handle.ptr())->ma_keys;
    polled.param_array = reinterpret_cast<PyListObject*>(polled.params.ptr())->ob_item;
    for (py::handle param : polled.params) members_.push_back(py::reinterpret_borrow<py::object>(param));
    polled.items = items_.size() - polled.first_item;
    polled.members = members_.size() - polled.first_member;
    polled_groups_.push_back(std::move(polled));
    int ignored = 0;
    if (!read_hyperparameters(polled_groups_.size() - 1, ignored)) {
      throw py::value_error(
          "every hyperparameter of a param group must be a number, a one-element tensor, or a tuple of these");
    }
  }
  reading_first_ = false;
}

bool GroupChanges::poll(int& answer) {
  if (static_cast<size_t>(PyList_GET_SIZE(groups_.ptr())) != polled_groups_.size()) return false;
  for (size_t index = 0; index < polled_groups_.size(); ++index) {
    if (index + kAhead < polled_groups_.size()) prefetch(polled_groups_[index + kAhead]);
    if (!poll_group(index, answer)) return false;
  }
  return true;
}

bool GroupChanges::poll_group(size_t index, int& answer) {
  PolledGroup& polled = polled_groups_[index];
  if (PyList_GET_ITEM(groups_.ptr(), static_cast<Py_ssize_t>(index)) != polled.group.ptr()) return false;

  bool changed = polled.volatile_values;
  if (!unchanged(polled.group.ptr(), polled.version)) {
    polled.version = version_of(polled.group.ptr());
    PyObject *key, *value;
    Py_ssize_t position = 0;
    size_t i = 0;
    while (PyDict_Next(polled.group.ptr(), &position, &key, &value)) {
      if (i == polled.items || items_[polled.first_item + i].ptr() != key) return false;
      py::object& item = items_[polled.first_item + i + 1];
      if (item.ptr() != value) {
        for (const py::str& decides : deciding_) {
          if (PyUnicode_Compare(decides.ptr(), key) == 0) return false;
        }
        item = py::reinterpret_borrow<py::object>(value);
        changed = true;
      }
      i += 2;
    }
    if (i != polled.items) return false;
  }

  if (static_cast<size_t>(PyList_GET_SIZE(polled.params.ptr())) != polled.members) return false;
  for (size_t m = 0; m < polled.members; ++m) {
    if (PyList_GET_ITEM(polled.params.ptr(), static_cast<Py_ssize_t>(m)) != members_[polled.first_member + m].ptr()) {
      return false;
    }
  }
  return !changed || read_hyperparameters(index, answer);
}

bool GroupChanges::read_hyperparameters(size_t index, int& answer) {
  PolledGroup& polled = polled_groups_[index];
  double* raw = raw_ + index * kGroupWidth;
  int64_t* lr = lr_ + index;
  polled.volatile_values = false;

  auto set = [&](int column, double number) {
    if (raw[column] != number) {
      raw[column] = number;
      answer |= kRawChanged;
    }
    return true;
  };
  auto put = [&](PyObject* value, int column) {
    if (!PyFloat_CheckExact(value) && PyObject_IsInstance(value, tensor_class_.ptr()) == 1) {
      polled.volatile_values = true;
      const py::handle tensor = value;
      const py::object dtype = tensor.attr("dtype"), place = tensor.attr("device").attr("type");
      // Prep reads this tensor on its device. Reading it here would wait for the device.
      if (!place.equal(py::str("cpu"))) {
        const bool wide = dtype.equal(float64_);
        if (column != kGroupLr || !(wide || dtype.equal(float32_))) return false;
        const int64_t address = address_of(tensor) | (wide ? 1 : 0);
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
    if (column == kGroupLr && *lr != 0) {
      *lr = 0;
      answer |= kRawChanged;
    }
    return set(column, number);
  };

  for (const auto& [key, first, count, optional, is_switch] : columns_) {
    PyObject* value = PyDict_GetItemWithError(polled.group.ptr(), key.ptr());
    const bool was_on = raw[first] != 0.0;
    if (optional && (value == nullptr || value == Py_None)) {
      for (int column = first; column < first + count; ++column) set(column, defaults_[column]);
    } else if (value == nullptr) {
      return false;
    } else if (PyTuple_Check(value) || PyList_Check(value)) {
      polled.volatile_values |= PyList_Check(value);
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

}  // namespace fused_optim
