// The change detector. Before each step it is polled for what changed since the tables were built, and writes the
// addresses of the gradients.
#pragma once
#include <vector>

#include "dlpack.h"
#include "group_changes.h"
#include "poll.h"
#include "state_changes.h"

namespace fused_optim {

// The addresses of a tensor's Python object and of torch's objects behind it. They are only prefetched, some rows
// ahead, and never read, so a stale address is harmless. Without prefetches, dependent cache misses would cost more
// than the whole step.
struct Hint {
  const void *object, *impl, *storage;
};

// A tensor as it was when the tables were built.
struct Place {
  Hint hint;
  const void* data;
  int ndim;
  DlType dtype;
  int bits;       // of complex tensors: is_conj, is_neg
  size_t layout;  // in `layouts_`: shape, then strides
};

// One row of the table.
struct PolledRow {
  PyObject* param;
  py::object target;   // the tensor that the kernel updates: the param, its shard, or a dense copy
  int64_t* grad_slot;  // this row's entry in a table's `grads`
  DlType grad_dtype;
  DlDevice device;
  int first_place;  // in `places_`: the param, then the tensors among its states
  int places;
  int ndim;       // of param, target and gradient, or of their shards
  size_t layout;  // in `layouts_`: shape and strides of the target
  Hint grad;      // of the last gradient
  PyTypeObject* param_type;
  bool spread;      // whether the param is a DTensor
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
  // grad_dtype. For DTensors, shards are compared. Throws BufferError if torch cannot describe a tensor by DLPack.
  void add_row(py::object param, py::object target, py::dict state, py::object grad_dtype, py::object grads,
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
  void add_place(py::handle tensor);
  size_t add_layout(const DlTensor& tensor, size_t guess);
  bool poll_places(const PolledRow& row) const;
  bool same(const Place& place) const;
  void prefetch(size_t row) const;
  bool poll_grad(PolledRow& row, int& answer);
  bool fits_target(const PolledRow& row, const DlTensor& grad) const;
  bool plain(PyObject* tensor, const DlTensor& seen) const;
  int bits_of(PyObject* tensor, DlType dtype) const;
  py::object shard_of_grad(PolledRow& row, py::object grad) const;
  int64_t version_of_tensor(const py::object& tensor) const;

  GroupChanges groups_;
  StateChanges states_;
  std::vector<PolledRow> rows_;
  std::vector<Place> places_;
  std::vector<int64_t> layouts_;
  std::vector<py::object> alive_;  // keeps the objects of the raw pointers alive
  std::vector<py::object> pending_;
  std::vector<py::object> guarded_;
  std::vector<int64_t> versions_;  // of those
  std::vector<py::object> held_;   // gradients in use: no other thread can free them while the GIL is released
  py::object stepped_;             // the list of params with gradients; None if it must be rebuilt
  Getter grad_{"grad"}, version_{"_version"};
  Question is_conj_{"is_conj"}, is_neg_{"is_neg"};
  py::object tensor_class_, parameter_class_, increment_version_;
};

}  // namespace fused_optim
