// csrc/cuda/partition.h as a Python module, for test_partition.py.
#include <pybind11/pybind11.h>

#include "cuda/partition.h"

namespace {

namespace py = pybind11;
using ctk::View;
using ctk::cuda::Partition;

py::dict described(const Partition& p, const View& v) {
  using namespace py::literals;
  return py::dict("plane"_a = p.plane, "vector"_a = p.vector, "one_pass"_a = p.one_pass, "threads"_a = p.threads, "repeat"_a = p.repeat,
                  "blocks"_a = p.blocks, "group"_a = p.group, "row"_a = p.row, "cols_per"_a = p.cols_per, "rows"_a = p.rows,
                  "rows_per"_a = p.rows_per, "row_cuts"_a = p.row_cuts, "col_cuts"_a = p.col_cuts, "slots"_a = p.slots(),
                  "columns"_a = p.columns(v));
}

View view(int64_t groups, int64_t outer, int64_t channels, int64_t inner) { return {groups, outer, channels, inner, true}; }

}  // namespace

PYBIND11_MODULE(partition_module, m) {
  m.def("partition_with", [](int64_t groups, int64_t outer, int64_t channels, int64_t inner, int64_t vector, bool sums) {
    const View v = view(groups, outer, channels, inner);
    return described(ctk::cuda::partition_with(v, vector, sums), v);
  });
  m.def("partition_for", [](int64_t groups, int64_t outer, int64_t channels, int64_t inner, int64_t itemsize, bool sums, bool aligned) {
    const View v = view(groups, outer, channels, inner);
    return described(ctk::cuda::partition_for(v, itemsize, sums, aligned), v);
  });
}
