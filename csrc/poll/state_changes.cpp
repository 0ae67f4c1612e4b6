#include "state_changes.h"

namespace fused_optim {
namespace {

// Whether a dict has `count` values and `same(number, value)` holds for each of them, in order.
template <class Same>
bool holds(PyObject* dict, size_t count, Same&& same) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t number = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (number == count || !same(number++, value)) return false;
  }
  return number == count;
}

}  // namespace

// The strings are interned once and never released.
PyObject* name_of_shard() {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return name;
}
PyObject* name_of_spec() {
  static PyObject* const name = PyUnicode_InternFromString("_spec");
  return name;
}

StateChanges::StateChanges(py::dict state) : state_(std::move(state)) {
  for (const auto& item : state_) states_.push_back(py::reinterpret_borrow<py::object>(item.second));
}

void StateChanges::add(py::dict dict) {
  const size_t first = entries_.size();
  for (const auto& item : dict) {
    alive_.push_back(py::reinterpret_borrow<py::object>(item.second));
    entries_.push_back(item.second.ptr());
  }
  const void* keys = reinterpret_cast<PyDictObject*>(dict.ptr())->ma_keys;
  dicts_.push_back({dict.ptr(), 0, first, entries_.size(), keys});
  alive_.push_back(std::move(dict));
}

py::handle StateChanges::add_shard(py::handle tensor) {
  shards_.push_back({py::reinterpret_borrow<py::object>(tensor), attribute(tensor.ptr(), name_of_shard())});
  return shards_.back().shard;
}

bool StateChanges::poll() {
  if (!unchanged(state_.ptr(), version_)) {
    const uint64_t version = version_of(state_.ptr());
    const auto same = [&](size_t number, PyObject* value) { return states_[number].ptr() == value; };
    if (!holds(state_.ptr(), states_.size(), same)) return false;
    version_ = version;
  }
  for (const Shard& entry : shards_) {
    if (attribute(entry.whole.ptr(), name_of_shard()).ptr() != entry.shard.ptr()) return false;
  }
  return true;
}

bool StateChanges::poll(size_t row) {
  Dict& polled = dicts_[row];
  if (unchanged(polled.dict, polled.version)) return true;
  polled.version = version_of(polled.dict);
  PyObject* const* entries = entries_.data() + polled.first;
  return holds(polled.dict, polled.end - polled.first,
               [&](size_t number, PyObject* value) { return entries[number] == value; });
}

}  // namespace fused_optim
