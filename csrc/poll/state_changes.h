// The part of the poll that compares optimizer.state: its dicts and their values must be those of the tables.
#pragma once
#include <vector>

#include "poll.h"

namespace fused_optim {

// Attributes of DTensors.
PyObject* name_of_shard();
PyObject* name_of_spec();

// An attribute of a Python object. Throws Python's exception if there is none.
inline py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// A DTensor and the shard that it held when the tables were built.
struct Shard {
  py::object whole, shard;
};

class StateChanges {
 public:
  explicit StateChanges(py::dict state);

  // Adds the dict of the next row: optimizer.state[param], or an empty dict.
  void add(py::dict dict);
  // Records the shard of a DTensor and returns it.
  py::handle add_shard(py::handle tensor);
  const std::vector<Shard>& shards() const { return shards_; }

  // Whether optimizer.state still holds the same dicts, and the DTensors the same shards.
  bool poll();
  // Whether the dict of a row still holds the same objects.
  bool poll(size_t row);
  // False if only poll() can tell. Unlike poll(), it makes no call of Python.
  bool has_same_version(size_t row) const { return unchanged(dicts_[row].dict, dicts_[row].version); }
  void prefetch(size_t row) const {
    prefetch_version(dicts_[row].dict);
    if (!kVersions) prefetch_lines(dicts_[row].keys, 2);
  }

 private:
  struct Dict {
    PyObject* dict;
    uint64_t version;   // when it was last read
    size_t first, end;  // in `entries_`: its values
    const void* keys;   // memory of the dict, only prefetched
  };

  py::dict state_;
  std::vector<py::object> states_;  // its values, in order
  uint64_t version_ = 0;
  std::vector<Dict> dicts_;
  std::vector<PyObject*> entries_;
  std::vector<Shard> shards_;
  std::vector<py::object> alive_;  // keeps the objects of the raw pointers alive
};

}  // namespace fused_optim
