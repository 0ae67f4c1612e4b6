// The look before each step: has anything moved since the tables were built, and where do the gradients lie now?
#pragma once
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "tables.h"

namespace fused_optim {

// Past the walk below lie some thousand tensors at every step, and after a pass over the model all of this has left the
// caches: hence the flat arrays, of what is looked at and no more.

// A tensor as it was when the tables were built.
struct Place {
  const c10::TensorImpl* impl;
  const c10::StorageImpl* storage;
  const void* data;
  int64_t offset;
  int64_t numel;
  at::ScalarType dtype;
  int strides;  // where in `strides_`, -1 where contiguous: the flag then says all
};

// One row of the table.
struct WatchedRow {
  at::Tensor param;
  at::Tensor target;   // the memory that the kernel updates: the param, or its dense copy where the param has holes
  PyObject* state;     // optimizer.state[param]
  uint64_t version;    // of that dict
  int64_t* grad_slot;  // this row's place in a table's `grads`
  at::ScalarType grad_dtype;
  int first_place;  // in `places_`: the param, then the tensors among its states
  int first_entry;  // in `entries_`: the values of `state`
  int places, entries;
  // Where the last look found things that no Place points to. Asked for some rows ahead and never read: a stale one
  // costs nothing, but one miss after the other would cost more than the whole step.
  const void* state_keys;
  const void* autograd_meta;
  const c10::TensorImpl* grad;
  const c10::StorageImpl* grad_storage;
  bool spread;      // the param is a DTensor
  py::object spec;  // of the last gradient that was spread as the param is
};

// A DTensor and the shard that it held when the tables were built.
struct Shard {
  py::object whole, shard;
};

// A key of a group, and the columns of raw that its value fills. Optional: where the key is missing or its value None,
// the columns keep what raw was made with. Switch: new tables are due once the value becomes zero, or no longer is.
using ColumnSpec = std::tuple<std::string, int, int, bool, bool>;
struct Column {
  py::str key;
  int first, count;
  bool optional, is_switch;
};

// One param_group: every key and value, by identity.
struct WatchedGroup {
  py::object group;
  py::list params;
  size_t first_item, items;        // in `items_`: key, value, key, value, ...
  size_t first_member, members;    // in `members_`: the params
  uint64_t version;                // of the dict, when it was last read
  bool volatile_values;            // holds tensors or lists, which change without changing identity
  const void *keys, *param_array;  // where dict and list keep their own, for prefetches alone
};

class Watch {
 public:
  enum Answer { kRebuild = 1, kGradsMoved = 2, kRawChanged = 4 };

  // columns: key in the group, first column of raw, how many, optional, switch. deciding: keys whose values decide what
  // tables look like, and have no column; what else is in a group may change as it likes. raw: float64 [groups,
  // kRawWidth], lr: int64 [groups], both host tensors written here.
  Watch(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
        const std::vector<std::string>& deciding, at::Tensor raw, at::Tensor lr);

  // `pending` params have had no gradient yet; the first one to get one asks for new tables.
  void add_pending(py::object param);
  // The row's place in `grads` (int64, host) gets the address of its gradient, of this dtype. Of DTensors it is the
  // shards that are looked at.
  void add_row(py::object param, at::Tensor target, py::dict state, at::ScalarType grad_dtype, at::Tensor grads,
               int64_t row);

  // Reads groups, params, states and gradients; writes raw, lr and the grad slots. kRebuild: the tables are stale,
  // nothing else is meant.
  int look();

  // After a step: lets the gradients go, and tells autograd that the params have changed.
  void done();

 private:
  void add_place(py::handle tensor);
  bool look_at_group(size_t index, int& answer);
  bool look_at_state();
  bool look_at_row(WatchedRow& row) const;
  bool same(const Place& place) const;
  void prefetch(size_t row) const;
  void prefetch_group(const WatchedGroup& group) const;
  bool read_hyperparameters(size_t index, int& answer);
  bool look_at_shards() const;
  bool look_at_grad(WatchedRow& row, int& answer);
  at::Tensor shard_of_grad(WatchedRow& row, const at::Tensor& grad) const;

  py::list groups_;
  py::dict state_;
  std::vector<Column> columns_;
  std::vector<py::str> deciding_;
  std::vector<double> defaults_;  // a row of raw as it was made
  bool reading_first_ = true;
  at::Tensor raw_, lr_;
  std::vector<WatchedGroup> watched_groups_;
  std::vector<py::object> items_, members_;
  std::vector<py::object> states_;  // the values of optimizer.state, in order
  uint64_t state_version_ = 0;
  std::vector<WatchedRow> rows_;
  std::vector<Place> places_;
  std::vector<Shard> shards_;
  std::vector<PyObject*> entries_;
  std::vector<std::vector<int64_t>> strides_;
  std::vector<py::object> alive_;  // all that the raw pointers point to
  std::vector<at::Tensor> alive_tensors_;
  std::vector<at::Tensor> pending_;
  std::vector<at::Tensor> held_;  // gradients in use, so that nobody frees them while the GIL is released
};

}  // namespace fused_optim
