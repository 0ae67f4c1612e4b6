// The look before each step: has anything moved since the tables were built, and where do the gradients lie now?
#pragma once
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "tables.h"

namespace fused_optim {

// A tensor as it was when the tables were built. Past the walks below lie some thousand tensors at every step: each
// check is a load and a compare.
struct Watched {
  c10::intrusive_ptr<c10::TensorImpl> impl;
  const c10::StorageImpl* storage = nullptr;
  const void* data = nullptr;
  int64_t offset = 0;
  int64_t numel = 0;
  caffe2::TypeMeta dtype;
  bool contiguous = false;
  std::vector<int64_t> strides;  // empty where contiguous, as most are: the flag then says all

  Watched() = default;
  explicit Watched(const at::Tensor& t);

  bool same() const {
    return impl->unsafe_storage().unsafeGetStorageImpl() == storage && storage->data() == data &&
           impl->storage_offset() == offset && impl->numel() == numel && impl->dtype() == dtype &&
           impl->is_contiguous() == contiguous && (contiguous || impl->strides().equals(strides));
  }
};

// One row of the table.
struct WatchedRow {
  at::Tensor param;
  at::Tensor target;  // the memory that the kernel updates: the param, or its dense copy where the param has holes
  Watched placed;     // the param's place
  py::object state;   // optimizer.state[param]
  std::vector<py::object> entries;  // its values
  std::vector<Watched> states;      // the tensors among them
  at::ScalarType grad_dtype;
  at::Tensor grads;    // the table's
  int64_t* grad_slot;  // this row's place in it
};

// A key of a group, and the columns of raw that its value fills.
struct Column {
  py::str key;
  int first, count;
};

// One param_group: every key and value but "params", by identity.
struct WatchedGroup {
  py::object group;
  py::list params;
  std::vector<py::object> members;
  std::vector<py::object> items;  // key, value, key, value, ...
  bool volatile_values;           // holds tensors or lists, which change without changing identity
};

class Watch {
 public:
  enum Answer { kRebuild = 1, kGradsMoved = 2, kRawChanged = 4 };

  // columns: (key in the group, first column of raw, how many). raw: float64 [groups, kRawWidth], lr: int64 [groups],
  // both host tensors written here.
  Watch(py::list groups, py::dict state, const std::vector<std::tuple<std::string, int, int>>& columns, at::Tensor raw,
        at::Tensor lr);

  // `pending` params have had no gradient yet; the first one to get one asks for new tables.
  void add_pending(py::object param);
  // The row's place in `grads` (int64, host) gets the address of its gradient, of this dtype.
  void add_row(py::object param, at::Tensor target, py::dict state, at::ScalarType grad_dtype, at::Tensor grads,
               int64_t row);

  // Reads groups, params, states and gradients; writes raw, lr and the grad slots. kRebuild: the tables are stale,
  // nothing else is meant.
  int look();

  // After a step: lets the gradients go, and tells autograd that the params have changed.
  void done();

 private:
  bool look_at_group(size_t index, int& answer);
  bool look_at_states() const;
  bool read_hyperparameters(size_t index, int& answer);
  bool look_at_grad(WatchedRow& row, int& answer);

  py::list groups_;
  py::dict state_;
  std::vector<Column> columns_;
  at::Tensor raw_, lr_;
  std::vector<WatchedGroup> watched_groups_;
  std::vector<py::object> states_;  // the values of optimizer.state, in order
  std::vector<WatchedRow> rows_;
  std::vector<at::Tensor> pending_;
  std::vector<at::Tensor> held_;  // gradients in use, so that nobody frees them while the GIL is released
};

}  // namespace fused_optim
