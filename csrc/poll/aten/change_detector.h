// The look of ../change_detector.h as torch's own headers allow it: several times as fast, and for one minor version of
// torch.
#pragma once
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "../group_changes.h"
#include "../poll.h"
#include "../state_changes.h"

namespace fused_optim {

inline const at::Tensor& unpack(py::handle object) { return THPVariable_Unpack(object.ptr()); }

// A tensor as it was when the tables were built.
struct Place {
  const c10::TensorImpl* impl;
  const c10::StorageImpl* storage;
  const void* data;
  int64_t offset;
  int64_t numel;
  at::ScalarType dtype;
  bool conj, neg;
  int strides;  // where in `strides_`, -1 where contiguous: the flag then says all
};

// One row of the table.
struct WatchedRow {
  // By their Python objects: torch swaps the contents of two tensors (model.half() of DTensors, for one) only where no
  // C++ holds a reference to them.
  PyObject* param;
  PyObject* target;  // the memory that the kernel updates: the param, or its dense copy where the param has holes
  const c10::TensorImpl* impl;  // of the param when the tables were built
  int64_t* grad_slot;           // this row's place in a table's `grads`
  at::ScalarType grad_dtype;
  int first_place;  // in `places_`: the param, then the tensors among its states
  int places;
  // Where the last look found things that no Place points to. Asked for some rows ahead and never read: a stale one
  // costs nothing, but one miss after the other would cost more than the whole step.
  const void* autograd_meta;
  const c10::TensorImpl* grad;
  const c10::StorageImpl* grad_storage;
  bool spread;      // the param is a DTensor
  py::object spec;  // of the last gradient that was spread as the param is
};

class ChangeDetector {
 public:
  // columns, deciding, raw, lr: as GroupChanges has them.
  ChangeDetector(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
                 const std::vector<std::string>& deciding, py::object raw, py::object lr);

  // `pending` params have had no gradient yet; the first one to get one asks for new tables.
  void add_pending(py::object param);
  // The row's place in `grads` (int64, host) gets the address of its gradient, of this dtype. Of DTensors it is the
  // shards that are looked at.
  void add_row(py::object param, py::object target, py::dict state, at::ScalarType grad_dtype, at::Tensor grads,
               int64_t row);

  // Reads groups, params, states and gradients; writes raw, lr and the grad slots. Returns Answers, added up.
  int poll();

  // After a step: lets the gradients go, and tells autograd that the params have changed.
  void done();

 private:
  void add_place(py::handle tensor, bool of_param);
  bool poll_places(const WatchedRow& row) const;
  bool same(const Place& place) const;
  void prefetch(size_t row) const;
  bool poll_grad(WatchedRow& row, int& answer);
  at::Tensor shard_of_grad(WatchedRow& row, const at::Tensor& grad) const;

  GroupChanges groups_;
  StateChanges states_;
  std::vector<WatchedRow> rows_;
  std::vector<Place> places_;
  std::vector<std::vector<int64_t>> strides_;
  std::vector<py::object> alive_;  // all that the raw pointers point to
  std::vector<at::Tensor> alive_tensors_;
  std::vector<py::object> pending_;
  std::vector<at::Tensor> held_;  // gradients in use, so that nobody frees them while the GIL is released
};

}  // namespace fused_optim
