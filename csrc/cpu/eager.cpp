// Entry points that call the kernels from Python without the dispatcher: on small tensors, dispatch takes longer than a kernel.
//
// An entry point serves valid calls of the common case (plain CPU tensors, no modes, nothing to record) and returns
// NotImplemented for all others: the caller then uses the dispatcher, which raises the errors. For a valid call that needs a
// gradient it returns None.
//
// Only Python's limited API and LibTorch's stable ABI are used. torch 2.14 added the two functions that turn Python's tensors
// into handles; with an older torch they are absent, and every call is declined.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <exception>
#include <utility>
#include <vector>

#include "driver.h"

#if defined(__GNUC__) && !defined(_WIN32)
extern "C" {
__attribute__((weak)) AOTITorchError torch_tensor_from_pyobject(void* object, AtenTensorHandle* tensor);
__attribute__((weak)) AOTITorchError torch_tensor_to_pyobject(AtenTensorHandle tensor, void* type, void** object);
}
#else
static AOTITorchError (*const torch_tensor_from_pyobject)(void*, AtenTensorHandle*) = nullptr;
static AOTITorchError (*const torch_tensor_to_pyobject)(AtenTensorHandle, void*, void**) = nullptr;
#endif

namespace ctk::cpu {
namespace {

// ---- the state of the process --------------------------------------------------------------------------------------

// The arguments of `eager_setup`; null before it is called.
struct Torch {
  PyTypeObject *tensor, *parameter;
  PyObject* forced;                        // a list, empty unless a backend is forced
  PyObject* states;                        // functions that return true if a mode, transform, trace or profiler is active
  PyObject* forward_ad;                    // the __dict__ of torch.autograd.forward_ad
  PyObject *count_write, *inference_mode;  // torch._C._increment_version, torch.is_inference_mode_enabled
  PyObject *level, *requires_grad;         // names of attributes
  PyObject *scale, *enable_gqa;            // names of arguments of scaled_dot_product_attention
  PyObject *is_neg, *is_inference;         // methods
};
Torch* torch_state = nullptr;

// Whether no mode, transform, trace, profiler or forced backend is active.
bool is_common_state() {
  if (!torch_state || PyList_Size(torch_state->forced) != 0) return false;
  PyObject* level = PyDict_GetItemWithError(torch_state->forward_ad, torch_state->level);
  if (!level || PyLong_AsLong(level) >= 0) return false;
  const Py_ssize_t count = PyTuple_Size(torch_state->states);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* state = PyObject_CallNoArgs(PyTuple_GetItem(torch_state->states, i));
    const int active = state ? PyObject_IsTrue(state) : -1;
    Py_XDECREF(state);
    if (active != 0) return false;
  }
  return true;
}

// ---- arguments -----------------------------------------------------------------------------------------------------

// Thrown to decline a call.
struct Declined {};
void require(bool condition) {
  if (!condition) throw Declined{};
}
void check(AOTITorchError error) { require(error == AOTI_TORCH_SUCCESS); }

// Calls a method that returns a bool.
bool call_bool(PyObject* method, PyObject* object) {
  PyObject* result = PyObject_CallFunctionObjArgs(method, object, nullptr);
  Py_XDECREF(result);  // True and False are not freed
  require(result == Py_True || result == Py_False);
  return result == Py_True;
}

// A non-empty CPU tensor: no subclass, no negative view, not nested, batched, functional or symbolic.
class StridedTensor {
 public:
  StridedTensor() = default;
  explicit StridedTensor(PyObject* object) : object_(object) {
    require(Py_TYPE(object) == torch_state->tensor || Py_TYPE(object) == torch_state->parameter);
    require(!call_bool(torch_state->is_neg, object));
    check(torch_tensor_from_pyobject(object, &handle_));
    describe();
    require(layout_ == aoti_torch_layout_strided() && device_ == aoti_torch_device_type_cpu());
    require(numel > 0 && data != nullptr);
  }
  StridedTensor(StridedTensor&& other) noexcept { *this = std::move(other); }
  StridedTensor& operator=(StridedTensor&& other) noexcept {
    std::swap(handle_, other.handle_), std::swap(object_, other.object_);
    dim = other.dim, numel = other.numel, sizes = other.sizes, strides = other.strides, dtype = other.dtype, data = other.data;
    return *this;
  }
  ~StridedTensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_; }
  bool is_wide() const { return dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64(); }
  bool is_double() const { return dtype == aoti_torch_dtype_float64(); }
  bool has_shape_of(const StridedTensor& other) const { return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes); }
  bool has_strides_of(const StridedTensor& other) const {
    for (int64_t d = 0; d < dim; ++d)
      if (strides[d] != other.strides[d] && sizes[d] != 1) return false;
    return true;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dim; d-- > 0; step *= sizes[d])
      if (sizes[d] != 1 && strides[d] != step) return false;
    return true;
  }
  bool requires_grad() const {
    PyObject* flag = PyObject_GetAttr(object_, torch_state->requires_grad);
    Py_XDECREF(flag);
    require(flag != nullptr);
    return flag == Py_True;
  }
  // Increments the version, as torch's in-place operations do.
  void count_write() const {
    if (call_bool(torch_state->is_inference, object_)) require(call_bool(torch_state->inference_mode, nullptr));
    PyObject* tensors = PyTuple_New(1);
    require(tensors != nullptr);
    PyTuple_SetItem(tensors, 0, Py_NewRef(object_));
    PyObject* done = PyObject_CallFunctionObjArgs(torch_state->count_write, tensors, nullptr);
    Py_DECREF(tensors);
    Py_XDECREF(done);
    require(done != nullptr);
  }
  DType type() const {
    if (dtype == aoti_torch_dtype_float32()) return DType::kFloat;
    if (dtype == aoti_torch_dtype_float64()) return DType::kDouble;
    if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
    require(dtype == aoti_torch_dtype_float16());
    return DType::kHalf;
  }
  // A new reference; for a tensor from Python, to the same object.
  PyObject* to_python() const {
    if (object_) return Py_NewRef(object_);
    void* object = nullptr;
    check(torch_tensor_to_pyobject(handle_, nullptr, &object));
    return static_cast<PyObject*>(object);
  }

  int64_t dim = 0, numel = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  void* data = nullptr;

 protected:
  // An uninitialised tensor.
  StridedTensor(const int64_t* sizes_, const int64_t* strides_, int64_t dim_, int32_t dtype_) {
    check(aoti_torch_empty_strided(dim_, sizes_, strides_, dtype_, aoti_torch_device_type_cpu(), 0, &handle_));
    describe();
  }

 private:
  void describe() {
    check(aoti_torch_get_dim(handle_, &dim));
    check(aoti_torch_get_numel(handle_, &numel));
    check(aoti_torch_get_sizes(handle_, const_cast<int64_t**>(&sizes)));
    check(aoti_torch_get_strides(handle_, const_cast<int64_t**>(&strides)));
    check(aoti_torch_get_dtype(handle_, &dtype));
    check(aoti_torch_get_layout(handle_, &layout_));
    check(aoti_torch_get_device_type(handle_, &device_));
    check(aoti_torch_get_data_ptr(handle_, &data));
  }
  AtenTensorHandle handle_ = nullptr;
  PyObject* object_ = nullptr;  // borrowed
  int32_t layout_ = 0, device_ = 0;
};

// One without gaps between its values, nor values that share memory.
class DenseTensor : public StridedTensor {
 public:
  DenseTensor() = default;
  explicit DenseTensor(PyObject* object) : StridedTensor(object) {
    int order[64], used;
    require(dim <= 64 && memory_order(sizes, strides, dim, order, used));
  }
  // Uninitialised tensors.
  DenseTensor like() const { return DenseTensor(sizes, strides, dim, dtype); }
  DenseTensor contiguous_like() const {
    int64_t dense[64], step = 1;
    for (int64_t d = dim; d-- > 0; step *= sizes[d]) dense[d] = step;
    return DenseTensor(sizes, dense, dim, dtype);
  }
  bool shares_memory_with(const DenseTensor& other) const {
    const char *from = static_cast<const char*>(data), *others = static_cast<const char*>(other.data);
    return from < others + other.bytes() && others < from + bytes();
  }
  int64_t bytes() const { return numel * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }

 private:
  DenseTensor(const int64_t* sizes_, const int64_t* strides_, int64_t dim_, int32_t dtype_) : StridedTensor(sizes_, strides_, dim_, dtype_) {}
};

double number(PyObject* object) {
  require(PyFloat_CheckExact(object));
  return PyFloat_AsDouble(object);
}
int64_t integer(PyObject* object) {
  require(PyLong_CheckExact(object));
  const long long value = PyLong_AsLongLong(object);
  require(!PyErr_Occurred());
  return value;
}
bool flag(PyObject* object) {
  require(object == Py_True || object == Py_False);
  return object == Py_True;
}
bool is_unit_interval(double value) { return 0.0 <= value && value <= 1.0; }

// ---- calls ---------------------------------------------------------------------------------------------------------

// Releases the GIL.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// Reads the arguments of a channelwise op one by one, and runs it.
template <class Op>
struct EagerCall {
  static constexpr int kParams = kParamsOf<Op>;

  DenseTensor x, params[kParams], residual;
  Operands in{};
  typename Op::Attributes attributes{};
  int64_t channel_dim = -1, channels = 1;  // channel_dim < 0: none
  bool records = false;                    // whether autograd records the call

  explicit EagerCall(PyObject* object) : x(object), grad_mode_(aoti_torch_grad_mode_is_enabled()) {
    in.dtype = x.type();
    in.x = x.data;
    for (int i = 0; i < kParams; ++i) in.params[i].fallback = parameter_of<Op>(i).fallback.value_or(0.0);
    note_grad(x);
  }
  // None, or a dimension, possibly negative.
  void set_channel_dim(PyObject* object) {
    if (object == Py_None) return;
    channel_dim = integer(object);
    require(-x.dim <= channel_dim && channel_dim < x.dim);
    if (channel_dim < 0) channel_dim += x.dim;
    channels = x.sizes[channel_dim];
  }
  // A parameter of one value or `count` values; with `runs`, of any number that divides `count`.
  void set_parameter(int i, PyObject* object, int64_t count, bool runs = false) {
    params[i] = DenseTensor(object);
    const int64_t values = params[i].numel;
    require(params[i].is_wide() && params[i].dim <= 1 && (values == 1 || values == count || (runs && count % values == 0)));
    set_parameter(i, params[i], values);
  }
  void set_parameter(int i, const DenseTensor& tensor, int64_t values) {
    require(tensor.is_contiguous());
    in.params[i] = {.data = tensor.data, .is_double = tensor.is_double(), .count = values, .fallback = in.params[i].fallback};
    note_grad(tensor);
  }
  void set_parameter_or_number(int i, PyObject* object, bool in_unit_interval) {
    if (!PyFloat_CheckExact(object)) return set_parameter(i, object, channels);
    in.params[i].fallback = PyFloat_AsDouble(object), in.params[i].is_number = true;
    require(!in_unit_interval || is_unit_interval(in.params[i].fallback));
  }
  void set_residual(PyObject* object) {
    if (object == Py_None) return;
    residual = DenseTensor(object);
    require(residual.dtype == x.dtype && residual.has_shape_of(x) && residual.has_strides_of(x));
    in.residual = residual.data;
    note_grad(residual);
  }
  void note_grad(const StridedTensor& tensor) { records = records || (grad_mode_ && tensor.requires_grad()); }

  void set_view() {
    bool shared = true;
    for (const Param& p : in.params) shared = shared && p.count == 1;
    in.view = view_of(x.sizes, x.strides, x.dim, shared ? -1 : channel_dim, false);
  }
  // With the checks of ctkernels/ops/memory.py.
  PyObject* forward_in_place() {
    for (const DenseTensor& t : params) require(!t || !t.shares_memory_with(x));
    require(!residual || residual.data == x.data || !residual.shares_memory_with(x));
    x.count_write();
    return write_over();
  }
  PyObject* forward() {
    set_view();
    const DenseTensor y = x.like();
    run(y.data);
    return y.to_python();
  }
  // Raises instead of declining: the dispatcher path would start from values that are already overwritten.
  PyObject* write_over() {
    set_view();
    try {
      run(x.data);
    } catch (const std::exception& error) {
      return PyErr_Format(PyExc_RuntimeError, "ctkernels: %s while writing over the first argument", error.what());
    }
    return x.to_python();
  }
  // A gradient for every input whose flag in `needs` is set, None for the others. Flags of other arguments may come first.
  PyObject* gradients(PyObject* needs, const DenseTensor& dy) {
    note_grad(dy);
    require(dy.dtype == x.dtype && dy.has_shape_of(x) && dy.has_strides_of(x) && !records);
    set_view();
    constexpr int kInputs = 1 + kParams + (Op::kPrologue ? 1 : 0);
    const Py_ssize_t before = PyTuple_Size(needs) - kInputs;
    require(before >= 0);
    const auto needed = [&](int i) { return PyTuple_GetItem(needs, before + i) == Py_True; };
    DenseTensor grads[kInputs];
    Gradients out;
    const auto allocate = [&](int i, DenseTensor grad, void*& slot) {
      slot = grad.data;
      grads[i] = std::move(grad);
    };
    if (needed(0)) allocate(0, x.like(), out.dx);
    for (int i = 0; i < kParams; ++i) {
      if (!needed(1 + i)) continue;
      require(static_cast<bool>(params[i]));
      allocate(1 + i, params[i].contiguous_like(), out.params[i]);
    }
    // Without a scale, x and the residual have the same gradient.
    const bool added = Op::kPrologue && needed(kInputs - 1), same = added && out.dx && !in.params[Op::kParams].is_given();
    require(!added || residual);
    if (added && !same) allocate(kInputs - 1, x.like(), out.dresidual);
    {
      const GilRelease unlocked;
      Driver(dy).template backward<Op>(attributes, in, dy.data, out);
    }
    PyObject* result = PyTuple_New(before + kInputs);
    require(result != nullptr);
    for (Py_ssize_t i = 0; i < before; ++i) PyTuple_SetItem(result, i, Py_NewRef(Py_None));
    for (int i = 0; i < kInputs; ++i) PyTuple_SetItem(result, before + i, grads[i] ? grads[i].to_python() : Py_NewRef(Py_None));
    if (same) PyTuple_SetItem(result, before + kInputs - 1, Py_NewRef(PyTuple_GetItem(result, before)));
    return result;
  }

  // The result of the op with `in`, whose view is set.
  void run(void* y) {
    const GilRelease unlocked;
    Driver(x).template forward<Op>(attributes, in, y);
  }

 private:
  bool grad_mode_;
};

// f(); NotImplemented if it declines, for the wrong number of arguments, or with a mode active.
template <class F>
PyObject* run_or_decline(bool valid_count, const F& f) {
  if (valid_count && is_common_state()) {
    try {
      return f();
    } catch (...) {  // the dispatcher path reports any other error, such as a lack of memory
    }
  }
  PyErr_Clear();
  return Py_NewRef(Py_NotImplemented);
}

// A new reference, released at the end of its scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) { require(object != nullptr); }
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// Concatenates two tuples.
template <size_t n>
void flatten(PyObject* first, PyObject* second, PyObject* (&to)[n]) {
  const Py_ssize_t split = PyTuple_Size(first);
  require(split + PyTuple_Size(second) == static_cast<Py_ssize_t>(n));
  for (Py_ssize_t i = 0; i < static_cast<Py_ssize_t>(n); ++i) to[i] = i < split ? PyTuple_GetItem(first, i) : PyTuple_GetItem(second, i - split);
}

// ---- ctu -----------------------------------------------------------------------------------------------------------

// beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps
constexpr int kCtuArguments = 10;

EagerCall<CtuOp> ctu_call(PyObject* x, PyObject* const* args) {
  EagerCall<CtuOp> call(x);
  call.set_channel_dim(args[6]);
  const bool raw = flag(args[8]);
  call.attributes = CtuOp::attributes(integer(args[7]), raw, number(args[9]));
  require(is_unit_interval(call.attributes.eps));
  kernel_of<CtuOp>(call.attributes.kind);  // throws for an unknown kind
  call.set_parameter_or_number(CtuOp::kBeta, args[0], !raw);
  call.set_parameter_or_number(CtuOp::kCoeff, args[1], !raw);
  if (call.attributes.kind == CtuOp::Variant::kLeaky) call.set_parameter_or_number(CtuOp::kSlope, args[2], false);
  for (int i = 0; i < 2; ++i)
    if (args[3 + i] != Py_None) call.set_parameter(CtuOp::kParams + i, args[3 + i], call.channels);
  call.set_residual(args[5]);
  return call;
}

// ctu(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps)
PyObject* ctu(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 1 + kCtuArguments, [&] {
    auto call = ctu_call(args[0], args + 1);
    return call.records ? Py_NewRef(Py_None) : call.forward();
  });
}

// The same, written over x; declined where it records a gradient.
PyObject* ctu_(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 1 + kCtuArguments, [&] {
    auto call = ctu_call(args[0], args + 1);
    require(!call.records);
    return call.forward_in_place();
  });
}

// ctu_gradients(needs, dy, (x, beta, coeff, slope, scale, shift, residual), (channel_dim, kind, raw, eps))
PyObject* ctu_gradients(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 4, [&] {
    PyObject* flat[1 + kCtuArguments];
    flatten(args[2], args[3], flat);
    return ctu_call(flat[0], flat + 1).gradients(args[0], DenseTensor(args[1]));
  });
}

// The values of a BatchNorm's vector.
void read(const DenseTensor& t, double* to) {
  switch (t.type()) {
    case DType::kFloat: std::copy_n(static_cast<const float*>(t.data), t.numel, to); return;
    case DType::kDouble: std::copy_n(static_cast<const double*>(t.data), t.numel, to); return;
    case DType::kBFloat16:
      for (int64_t c = 0; c < t.numel; ++c) to[c] = std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(t.data)[c]) << 16);
      return;
    case DType::kHalf: throw Declined{};
  }
}

// ctu_after_norm(x, beta, coeff, slope, None, None, residual, channel_dim, kind, raw, eps, mean, variance, gain, offset, norm_eps)
//
// ctu(gain (x - mean) / sqrt(variance + norm_eps) + offset + residual), channels along dimension 1, written over x, which only
// the caller refers to.
PyObject* ctu_after_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 1 + kCtuArguments + 5, [&] {
    auto call = ctu_call(args[0], args + 1);
    require(call.x.dim > 1 && (call.channel_dim == 1 || call.channel_dim < 0));
    call.channel_dim = 1;
    PyObject* const* norm = args + 1 + kCtuArguments;
    const int64_t channels = call.x.sizes[1];
    std::vector<double> values(4 * channels);
    double* const vectors[] = {values.data(), values.data() + channels, values.data() + 2 * channels, values.data() + 3 * channels};
    const auto [mean, variance, gain, offset] = vectors;
    std::fill_n(gain, channels, 1.0);
    const bool half = call.in.dtype == DType::kBFloat16 || call.in.dtype == DType::kHalf;
    for (int i = 0; i < 4; ++i) {
      if (i >= 2 && norm[i] == Py_None) continue;
      const DenseTensor t(norm[i]);
      require(t.dim == 1 && t.numel == channels && (t.dtype == call.x.dtype || (half && t.dtype == aoti_torch_dtype_float32())));
      call.note_grad(t);
      read(t, vectors[i]);
    }
    if (call.records) return Py_NewRef(Py_None);
    const double eps = number(norm[4]);
    double *const scale = gain, *const shift = offset;
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] *= 1.0 / std::sqrt(variance[c] + eps);
      shift[c] -= mean[c] * scale[c];
    }
    for (int i = 0; i < 2; ++i)
      call.in.params[CtuOp::kParams + i] = {.data = i ? shift : scale, .is_double = true, .count = channels};
    return call.write_over();
  });
}

// ---- head_edit -----------------------------------------------------------------------------------------------------

// The flat arguments of the op: z, m, a, g_m, g_a, channel_dim
EagerCall<HeadEditOp> head_edit_call(PyObject* const* args) {
  EagerCall<HeadEditOp> call(args[0]);
  call.set_channel_dim(args[5]);
  for (int i = 0; i < HeadEditOp::kParams; ++i)
    if (args[1 + i] != Py_None) call.set_parameter(i, args[1 + i], call.channels, true);
  return call;
}

PyObject* head_edit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 6, [&] {
    auto call = head_edit_call(args);
    return call.records ? Py_NewRef(Py_None) : call.forward();
  });
}

// head_edit_gradients(needs, dy, (z, m, a, g_m, g_a), (channel_dim,))
PyObject* head_edit_gradients(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 4, [&] {
    PyObject* flat[6];
    flatten(args[2], args[3], flat);
    return head_edit_call(flat).gradients(args[0], DenseTensor(args[1]));
  });
}

// The arguments of the public function: z ends in heads * head_dim, m and a are (heads, head_dim), the gates (heads,)
EagerCall<HeadEditOp> heads_call(PyObject* const* args) {
  EagerCall<HeadEditOp> call(args[0]);
  require(call.x.dim > 0);
  call.channel_dim = call.x.dim - 1;
  const int64_t channels = call.x.sizes[call.channel_dim];
  for (int i = 0; i < 2; ++i) {
    const int edit = HeadEditOp::kM + i, gate = HeadEditOp::kGateM + i;
    if (args[1 + edit] != Py_None) {
      DenseTensor& t = call.params[edit] = DenseTensor(args[1 + edit]);
      require(t.is_wide() && t.dim == 2 && t.numel == channels);
      call.set_parameter(edit, t, channels);
    }
    if (args[1 + gate] == Py_None) continue;
    require(static_cast<bool>(call.params[edit]));
    DenseTensor& t = call.params[gate] = DenseTensor(args[1 + gate]);
    require(t.is_wide() && t.dim == 1 && t.numel == call.params[edit].sizes[0]);
    call.set_parameter(gate, t, t.numel);
  }
  const DenseTensor &m = call.params[HeadEditOp::kM], &a = call.params[HeadEditOp::kA];
  require((m || a) && (!m || !a || m.has_shape_of(a)));
  return call;
}

// head_edit_of_heads(z, m, a, g_m, g_a)
PyObject* head_edit_of_heads(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 5, [&] {
    auto call = heads_call(args);
    return call.records ? Py_NewRef(Py_None) : call.forward();
  });
}

// head_edit_of_heads_gradients(needs, dy, (z, m, a, g_m, g_a), ())
PyObject* head_edit_of_heads_gradients(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 4, [&] {
    PyObject* flat[5];
    flatten(args[2], args[3], flat);
    return heads_call(flat).gradients(args[0], DenseTensor(args[1]));
  });
}

// ---- attention_head_edit -------------------------------------------------------------------------------------------

// The edits of attention, per head: m and a are (heads, size), the gates (heads,). null: absent.
struct Edits {
  DenseTensor tensors[HeadEditOp::kParams];

  Edits(PyObject* const* objects, int64_t heads, int64_t size) {
    for (int i = 0; i < HeadEditOp::kParams; ++i) {
      if (objects[i] == Py_None) continue;
      const bool is_gate = i >= HeadEditOp::kGateM;
      DenseTensor& t = tensors[i] = DenseTensor(objects[i]);
      require(t.is_wide() && t.is_contiguous() && t.dim == (is_gate ? 1 : 2) && t.sizes[0] == heads && (is_gate || t.sizes[1] == size));
      require(!is_gate || tensors[i - HeadEditOp::kGateM]);
    }
    require(tensors[HeadEditOp::kM] || tensors[HeadEditOp::kA]);
  }

  // Edits z (batch, heads, tokens, size) in place, as head_edit with head_axis=1 does.
  void apply(PyObject* z) const {
    EagerCall<HeadEditOp> call(z);
    const int64_t *n = call.x.sizes, *s = call.x.strides;
    const int64_t heads = n[1], size = n[3];
    const bool adjacent = heads == 1 || s[1] == size * s[3];  // the heads of a token
    require(adjacent || call.x.is_contiguous());
    for (int i = 0; i < HeadEditOp::kParams; ++i) {
      const DenseTensor& t = tensors[i];
      if (!t) continue;
      const int64_t each = t.numel / heads;
      Param& p = call.in.params[i];
      p.data = t.data, p.is_double = t.is_double(), p.groups = adjacent ? 1 : heads, p.count = adjacent ? t.numel : each;
    }
    bool shared = true;
    for (const Param& p : call.in.params) shared = shared && p.count == 1;
    const int64_t sizes[] = {adjacent ? n[0] : n[0] * heads, n[2], adjacent ? heads * size : size};
    const int64_t strides[] = {adjacent ? s[0] : s[1], s[2], s[3]};
    call.in.view = view_of(sizes, strides, 3, shared ? -1 : 2, !adjacent);
    require(call.in.view.dense);
    call.run(call.x.data);
  }
};

// attention_head_edit(attend, q, k, v, m, a, g_m, g_a, mask, is_causal, scale, enable_gqa): torch's scaled_dot_product_attention,
// `attend`, whose result is edited in place. None for a valid call that needs a gradient.
PyObject* attention_head_edit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return run_or_decline(count == 12, [&] {
    const DenseTensor q(args[1]);
    const StridedTensor k(args[2]), v(args[3]);
    require(q.dim == 4 && k.dim == 4 && v.dim == 4 && k.dtype == q.dtype && v.dtype == q.dtype);
    q.type();  // declines what is not a floating-point number
    const int64_t heads = q.sizes[1], groups = k.sizes[1], tokens = q.sizes[2], keys = k.sizes[2];
    require(k.sizes[0] == q.sizes[0] && k.sizes[3] == q.sizes[3] && std::equal(k.sizes, k.sizes + 3, v.sizes));
    const bool is_causal = flag(args[9]), grouped = groups != heads;
    require(flag(args[11]) ? heads % groups == 0 : !grouped);
    require(!is_causal || tokens == 1 || (tokens == keys && args[8] == Py_None));
    const double scale = args[10] == Py_None ? 1.0 / std::sqrt(static_cast<double>(q.sizes[3])) : number(args[10]);
    const Edits edits(args + 4, heads, v.sizes[3]);
    if (args[8] != Py_None) {
      const StridedTensor mask(args[8]);
      require((mask.dtype == aoti_torch_dtype_bool() || mask.dtype == q.dtype) && mask.dim == 4 && !mask.requires_grad());
      const int64_t shape[] = {q.sizes[0], heads, tokens, keys};
      for (int d = 0; d < 4; ++d) require(mask.sizes[d] == 1 || mask.sizes[d] == shape[d]);
    }
    bool records = q.requires_grad() || k.requires_grad() || v.requires_grad();
    for (const DenseTensor& t : edits.tensors) records = records || (t && t.requires_grad());
    if (records && aoti_torch_grad_mode_is_enabled()) return Py_NewRef(Py_None);
    Owned positional(PyTuple_New(6)), named(PyDict_New()), scaled(PyFloat_FromDouble(scale));
    PyObject* const values[] = {Py_NewRef(args[1]), Py_NewRef(args[2]), Py_NewRef(args[3]), Py_NewRef(args[8]), PyFloat_FromDouble(0.0),
                                Py_NewRef(is_causal && tokens > 1 ? Py_True : Py_False)};
    for (int i = 0; i < 6; ++i) PyTuple_SetItem(positional.get(), i, values[i]);
    require(PyDict_SetItem(named.get(), torch_state->scale, scaled.get()) == 0);
    require(PyDict_SetItem(named.get(), torch_state->enable_gqa, grouped ? Py_True : Py_False) == 0);
    Owned z(PyObject_Call(args[0], positional.get(), named.get()));
    edits.apply(z.get());
    return z.release();
  });
}

// ---- snapshots of modules (fusion/layers.py) -----------------------------------------------------------------------

bool has_pairs(PyObject* dict, PyObject* pairs) {
  if (!PyDict_Check(dict) || 2 * PyDict_Size(dict) != PyTuple_Size(pairs)) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0, i = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (key != PyTuple_GetItem(pairs, i) || value != PyTuple_GetItem(pairs, i + 1)) return false;
    i += 2;
  }
  return true;
}

bool has_attributes(PyObject* cls, PyObject* pairs) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(pairs); i += 2) {
    PyObject* value = PyObject_GetAttr(cls, PyTuple_GetItem(pairs, i));
    Py_XDECREF(value);
    if (value != PyTuple_GetItem(pairs, i + 1)) return false;
  }
  return true;
}

// unchanged(((object, class, (name, value, ...), ((dict, (key, value, ...)), ...)), ...)): whether every object still has its
// class, every class its attributes, and every dict its entries in that order, all compared by identity.
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 1) return PyErr_Format(PyExc_TypeError, "unchanged takes 1 argument, got %zd", count);
  for (Py_ssize_t i = 0; i < PyTuple_Size(args[0]); ++i) {
    PyObject* known = PyTuple_GetItem(args[0], i);
    PyObject* cls = PyTuple_GetItem(known, 1);
    bool same = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GetItem(known, 0))) == cls && has_attributes(cls, PyTuple_GetItem(known, 2));
    PyObject* dicts = PyTuple_GetItem(known, 3);
    for (Py_ssize_t j = 0; same && j < PyTuple_Size(dicts); ++j) {
      PyObject* pair = PyTuple_GetItem(dicts, j);
      same = has_pairs(PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1));
    }
    if (same) continue;
    PyErr_Clear();
    return Py_NewRef(Py_False);
  }
  return Py_NewRef(Py_True);
}

// ---- the module ----------------------------------------------------------------------------------------------------

// eager_setup(Tensor, Parameter, forced, states, forward_ad, count_write, inference_mode): see Torch. Returns False if this
// torch lacks the functions needed.
PyObject* eager_setup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "eager_setup takes 7 arguments, got %zd", count);
  if (torch_tensor_from_pyobject == nullptr || torch_tensor_to_pyobject == nullptr) return Py_NewRef(Py_False);
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(args[i]);
  PyObject *is_neg = PyObject_GetAttrString(args[0], "is_neg"), *is_inference = PyObject_GetAttrString(args[0], "is_inference");
  PyObject *level = PyUnicode_InternFromString("_current_level"), *requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject *scale = PyUnicode_InternFromString("scale"), *enable_gqa = PyUnicode_InternFromString("enable_gqa");
  if (!is_neg || !is_inference || !level || !requires_grad || !scale || !enable_gqa) return nullptr;
  torch_state = new Torch{reinterpret_cast<PyTypeObject*>(args[0]), reinterpret_cast<PyTypeObject*>(args[1]), args[2], args[3],
                          args[4], args[5], args[6], level, requires_grad, scale, enable_gqa, is_neg, is_inference};
  return Py_NewRef(Py_True);
}

#define CTK_ENTRY(name) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&name)), METH_FASTCALL, nullptr}
PyMethodDef entries[] = {CTK_ENTRY(eager_setup), CTK_ENTRY(ctu), CTK_ENTRY(ctu_), CTK_ENTRY(ctu_gradients), CTK_ENTRY(ctu_after_norm),
                         CTK_ENTRY(head_edit), CTK_ENTRY(head_edit_gradients), CTK_ENTRY(head_edit_of_heads),
                         CTK_ENTRY(head_edit_of_heads_gradients), CTK_ENTRY(attention_head_edit), CTK_ENTRY(unchanged),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMethodDef* eager_entries() { return entries; }

}  // namespace ctk::cpu
