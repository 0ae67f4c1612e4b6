// The part of the poll that compares the param groups with those of the tables, and reads their hyperparameters.
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "poll.h"

namespace fused_optim {

// A key of a group, and the columns of raw that its value fills: key, first column, number of columns, optional,
// switch. Optional: if the key is missing or its value is None, the columns get their initial values. Switch: a change
// between zero and non-zero needs new tables.
using ColumnSpec = std::tuple<std::string, int, int, bool, bool>;
struct Column {
  py::str key;
  int first, count;
  bool optional, is_switch;
};

// One param group: every key and value, compared by identity.
struct PolledGroup {
  py::object group;
  py::list params;
  size_t first_item, items;        // in `items_`: key, value, key, value, ...
  size_t first_member, members;    // in `members_`: the params
  uint64_t version;                // of the dict, when it was last read
  bool volatile_values;            // whether a value is a tensor or list, which can change in place
  const void *keys, *param_array;  // memory of the dict and of the params list, only prefetched
};

class GroupChanges {
 public:
  // deciding: keys without columns that determine the tables, so a new value needs new tables. The values of all other
  // keys can change freely. raw: float64 [groups, kGroupWidth]. lr: int64 [groups]. Both are host tensors and are
  // written here.
  GroupChanges(py::list groups, const std::vector<ColumnSpec>& columns, const std::vector<std::string>& deciding,
               py::object raw, py::object lr);

  // Writes raw and lr, and adds kRawChanged to the answer if they changed. Returns false if new tables are needed.
  bool poll(int& answer);

 private:
  bool poll_group(size_t index, int& answer);
  bool read_hyperparameters(size_t index, int& answer);

  py::list groups_;
  std::vector<Column> columns_;
  std::vector<py::str> deciding_;
  std::vector<double> defaults_;  // the initial row of raw
  bool reading_first_ = true;
  py::object raw_tensor_, lr_tensor_, tensor_class_, float32_, float64_;
  double* raw_;
  int64_t* lr_;
  std::vector<PolledGroup> polled_groups_;
  std::vector<py::object> items_, members_;
};

}  // namespace fused_optim
