// csrc/cuda/plan.h as a Python module, for test_plan.py.
#include <pybind11/pybind11.h>

#include "cuda/plan.h"

namespace {

namespace py = pybind11;
using ctk::View;
using ctk::cuda::Plan;

py::dict described(const Plan& p, const View& v) {
  using namespace py::literals;
  return py::dict("plane"_a = p.plane, "wide"_a = p.wide, "direct"_a = p.direct, "threads"_a = p.threads, "repeat"_a = p.repeat,
                  "programs"_a = p.programs, "group"_a = p.group, "row"_a = p.row, "cols_per"_a = p.cols_per, "rows"_a = p.rows,
                  "rows_per"_a = p.rows_per, "row_cuts"_a = p.row_cuts, "col_cuts"_a = p.col_cuts, "slots"_a = p.slots(),
                  "columns"_a = p.columns(v));
}

View view(int64_t groups, int64_t outer, int64_t channels, int64_t inner) { return {groups, outer, channels, inner, true}; }

}  // namespace

PYBIND11_MODULE(plan_module, m) {
  m.def("plan_with", [](int64_t groups, int64_t outer, int64_t channels, int64_t inner, int64_t vector, bool sums) {
    const View v = view(groups, outer, channels, inner);
    return described(ctk::cuda::plan_with(v, vector, sums), v);
  });
  m.def("plan_for", [](int64_t groups, int64_t outer, int64_t channels, int64_t inner, int64_t itemsize, bool sums, bool aligned) {
    const View v = view(groups, outer, channels, inner);
    return described(ctk::cuda::plan_for(v, itemsize, sums, aligned), v);
  });
}
