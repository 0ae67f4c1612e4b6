// The look at the param groups: are they those that the tables were built for, and what are their hyperparameters now?
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "poll.h"

namespace fused_optim {

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

class GroupChanges {
 public:
  // columns: key in the group, first column of raw, how many, optional, switch. deciding: keys whose values decide what
  // tables look like, and have no column; what else is in a group may change as it likes. raw: float64 [groups,
  // kGroupWidth], lr: int64 [groups], both host tensors written here.
  GroupChanges(py::list groups, const std::vector<ColumnSpec>& columns, const std::vector<std::string>& deciding,
               py::object raw, py::object lr);

  // Writes raw and lr, and says so in the answer where they have changed. False: new tables are due.
  bool poll(int& answer);

 private:
  bool look_at_group(size_t index, int& answer);
  bool read_hyperparameters(size_t index, int& answer);

  py::list groups_;
  std::vector<Column> columns_;
  std::vector<py::str> deciding_;
  std::vector<double> defaults_;  // a row of raw as it was made
  bool reading_first_ = true;
  py::object raw_tensor_, lr_tensor_, tensor_class_, float32_, float64_;
  double* raw_;
  int64_t* lr_;
  std::vector<WatchedGroup> watched_groups_;
  std::vector<py::object> items_, members_;
};

}  // namespace fused_optim
