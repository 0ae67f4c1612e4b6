// The change detector of ../change_detector.h, written with torch's headers. It is several times as fast, and works
// with one minor version of torch.
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
  int strides;  // index in `strides_`; -1 if contiguous, when the flag is enough
};

// One row of the table.
struct PolledRow {
  // Python objects, because torch swaps the contents of two tensors (as model.half() does with DTensors) only if no C++
  // code holds a reference to them.
  PyObject* param;
  PyObject* target;             // the tensor that the kernel updates: the param, its shard, or a dense copy
  const c10::TensorImpl* impl;  // of the param when the tables were built
  int64_t* grad_slot;           // this row's entry in a table's `grads`
  at::ScalarType grad_dtype;
  int first_place;  // in `places_`: the param, then the tensors among its states
  int places;
  bool spread;     // whether the param is a DTensor
  bool wraps;      // whether a tensor of the row is a subclass, whose C++ methods can call Python
  bool inference;  // whether the param is an inference tensor, which has no version
  // Addresses that the last poll found and that are not in a Place. They are only prefetched, some rows ahead, and
  // never read, so a stale address is harmless. Without prefetches, dependent cache misses would cost more than the
  // whole step.
  const void* autograd_meta;
  const void* version;
  const c10::TensorImpl* grad;
  const c10::StorageImpl* grad_storage;
  py::object spec;  // the _spec of the last gradient with the param's placements
};

class ChangeDetector {
 public:
  // columns, deciding, raw, lr: as in GroupChanges.
  ChangeDetector(py::list groups, py::dict state, const std::vector<ColumnSpec>& columns,
                 const std::vector<std::string>& deciding, py::object raw, py::object lr);

  // Adds a param that has had no gradient yet. When it gets one, new tables are needed.
  void add_pending(py::object param);
  // Adds a row. Its entry in `grads` (int64, host) gets the address of its gradient, which must have the dtype
  // grad_dtype. For DTensors, shards are compared.
  void add_row(py::object param, py::object target, py::dict state, at::ScalarType grad_dtype, at::Tensor grads,
               int64_t row);

  // Adds a tensor that only steps may write to. Any other write asks for new tables.
  void add_guarded(py::object tensor);

  // Reads groups, params, states and gradients. Writes raw, lr and the grad slots. Returns Answer flags.
  int poll();

  // Call this after a step: releases the gradients, and increments the versions of the stepped params for autograd.
  void done();

  // torch's count of the writes to each guarded tensor, as it was after the last step.
  const std::vector<int64_t>& versions() const { return versions_; }

 private:
  void add_place(py::handle tensor, bool of_param);
  // Polls the rows from first to end without calls of Python and of torch's operators, so all threads can do it while
  // the caller holds the GIL. Returns false if a row needs such a call, or new tables.
  bool poll_unchanged(size_t first, size_t end, int& answer);
  bool poll_unchanged(size_t number, int& answer);
  bool poll_row(size_t number, int& answer);
  bool poll_places(const PolledRow& row) const;
  bool same(const Place& place) const;
  void prefetch(size_t row) const;
  void prefetch_done(size_t row) const;
  bool poll_grad(size_t number, int& answer);
  void hold(size_t number, at::Tensor grad, int& answer);
  at::Tensor shard_of_grad(PolledRow& row, const at::Tensor& grad) const;

  GroupChanges groups_;
  StateChanges states_;
  std::vector<PolledRow> rows_;
  std::vector<Place> places_;
  std::vector<std::vector<int64_t>> strides_;
  std::vector<py::object> alive_;  // keeps the objects of the raw pointers alive
  std::vector<at::Tensor> alive_tensors_;
  std::vector<py::object> pending_;
  std::vector<py::object> guarded_;
  std::vector<int64_t> versions_;  // of those
  std::vector<at::Tensor> held_;   // by row, gradients in use: no other thread can free them while the GIL is released
  int64_t elements_ = 0;           // of all rows
};

}  // namespace fused_optim
