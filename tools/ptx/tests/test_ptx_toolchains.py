"""Unmodified PTX from nvcc and Triton for sm_80, sm_90 and sm_100, executed and compared with float64."""

from __future__ import annotations

import ctypes

import pytest

np = pytest.importorskip("numpy", minversion="2.0")
torch = pytest.importorskip("torch")

from ptx import Fault, load, run  # noqa: E402
from ptx.launch import Launch, execute  # noqa: E402
from ptx.toolchain import TARGETS, compile_cuda, compile_triton, find_entry, has_triton, nvcc  # noqa: E402

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
every_target = pytest.mark.parametrize("sm", TARGETS)

CUDA = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
template <typename T> __device__ float up(T v) { return float(v); }
template <typename T> struct alignas(16) Pack { T v[16 / sizeof(T)]; };

template <typename T> struct Args {
  const T* x; T* y; const float* scale; int channels; long inner; long n; float shift;
};

// y = scale[channel] * x / (1 + exp(-x)) + log1p(exp(-|x|)) + shift, 16 bytes a thread
template <typename T> __global__ void __launch_bounds__(128) gate(const Args<T> a) {
  constexpr int V = 16 / sizeof(T);
  long i = (blockIdx.x * long(blockDim.x) + threadIdx.x) * V;
#ifndef NO_MASK
  if (i >= a.n) return;
#endif
  Pack<T> p = *reinterpret_cast<const Pack<T>*>(a.x + i), q;
  float s = a.scale[i / a.inner % a.channels];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    float v = up(p.v[k]);
    q.v[k] = T(s * v / (1.f + expf(-v)) + log1pf(expf(-fabsf(v))) + a.shift);
  }
  *reinterpret_cast<Pack<T>*>(a.y + i) = q;
}
template __global__ void gate<float>(Args<float>);
template __global__ void gate<__nv_bfloat16>(Args<__nv_bfloat16>);
template __global__ void gate<__half>(Args<__half>);

__device__ float warp_sum(float v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// partial[channel, split]: sums over one channel of x [rows, channels, inner]
__global__ void __launch_bounds__(128) channel_sums(const float* x, float* partial, int rows, int channels, int inner) {
  __shared__ float part[4];
  int channel = blockIdx.x;
  float sum = 0;
  for (long i = blockIdx.y * long(blockDim.x) + threadIdx.x; i < long(rows) * inner; i += long(gridDim.y) * blockDim.x)
    sum += x[(i / inner * channels + channel) * inner + i % inner];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
#ifndef NO_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x < 32) {
    sum = threadIdx.x < 4 ? part[threadIdx.x] : 0.f;
    sum = warp_sum(sum);
#ifdef LATE_STORE
    if (threadIdx.x == 0) partial[channel] = sum;
#else
    if (threadIdx.x == 0) partial[channel * gridDim.y + blockIdx.y] = sum;
#endif
  }
}

__global__ void finish(const float* partial, float* out, int channels, int splits) {
  extern __shared__ float buffer[];
  int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < channels) {
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += partial[c * splits + s];
    buffer[threadIdx.x] = sum;
    out[c] = buffer[threadIdx.x];
  }
}

// Philox 4x32-10
__global__ void philox(uint4* out, uint64_t seed, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t c0 = i, c1 = 1, c2 = 2, c3 = 3, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int r = 0; r < 10; ++r) {
    uint32_t h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    uint32_t h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  out[i] = make_uint4(c0, c1, c2, c3);
}

__global__ void doubles(const double* x, double* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    y[i] = exp(-x[i] * x[i]) / (1.0 + sqrt(fabs(x[i]))) + tanh(x[i]) + log1p(fabs(x[i])) + pow(fabs(x[i]), 1.7);
}

// sinf of large arguments goes through local memory
__global__ void wide_sine(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = sinf(x[i]) + powf(fabsf(x[i]), 0.3f) + erff(x[i]) + 1.f / x[i];
}

__global__ void pairs(const __nv_bfloat162* x, const __nv_bfloat162* w, __nv_bfloat162* y, const __half2* h,
                      __half2* g, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    y[i] = __hfma2_relu(x[i], w[i], __hmax2(x[i], w[i]));
    g[i] = __hadd2(__hmul2(h[i], h[i]), __hneg2(h[i]));
  }
}

__noinline__ __device__ double2 halves(double v, int k) { return make_double2(v * k, v / (k + 1)); }
__global__ void calls(double* y) {
  double2 p = halves(threadIdx.x + 1.0, threadIdx.x);
  y[threadIdx.x] = p.x - p.y;
}

__global__ void histogram(const int* x, int* counts, unsigned long long* total, int n) {
  __shared__ int local[16];
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    atomicAdd(&local[x[i] & 15], 1);
    atomicMax(total, (unsigned long long)x[i]);
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}

// The block that takes the last ticket adds up what every thread of every block has stored.
__global__ void last_block(float* partial, float* out, unsigned* tickets) {
  __shared__ unsigned ticket;
  __stcg(partial + blockIdx.x * blockDim.x + threadIdx.x, float(threadIdx.x));
  __threadfence();
#ifndef NO_BARRIER
  __syncthreads();  // the ticket is one for all threads
#endif
  if (threadIdx.x == 0) ticket = atomicInc(tickets, gridDim.x - 1);
  __syncthreads();
  if (ticket != gridDim.x - 1) return;
#ifndef NO_FENCE
  __threadfence();
#endif
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += __ldcg(partial + i * blockDim.x + threadIdx.x);
  out[threadIdx.x] = sum;
}
"""


class Args(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("channels", ctypes.c_int),
        ("inner", ctypes.c_long), ("n", ctypes.c_long), ("shift", ctypes.c_float),
    ]  # fmt: skip


def error(got, want):
    assert got.isfinite().all()
    return ((got.double() - want.double()).abs() / (1 + want.double().abs())).max().item()


def gate_truth(x, scale):
    v = x.double()
    return scale.double().view(1, -1, 1) * v * torch.sigmoid(v) + torch.log1p(torch.exp(-v.abs()))


TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def gate_launch(ptx, x, y, scale):
    vector = 16 // x.element_size()
    args = Args(x.data_ptr(), y.data_ptr(), scale.data_ptr(), x.shape[1], x.shape[2], x.numel(), 0.0)
    name = {torch.float32: "gateIf", torch.bfloat16: "gateI13__nv_bfloat16", torch.float16: "gateI6__half"}[x.dtype]
    return Launch(ptx, find_entry(ptx, name), (-(-x.numel() // vector // 128),), (128,), 0, [args])


def sums(ptx, x, splits, **more):
    rows, channels, inner = x.shape
    partial, out = torch.empty(channels, splits), torch.empty(channels)
    launches = [
        Launch(ptx, "channel_sums", (channels, splits), (128,), 0, [x, partial, rows, channels, inner]),
        Launch(ptx, "finish", (1,), (32,), 32 * 4, [partial, out, channels, splits]),
    ]
    execute(launches, readonly=[x], unwritten=[partial, out], **more)
    return out


@needs_nvcc
@every_target
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cuda_elementwise(sm, dtype):
    ptx = compile_cuda(CUDA, sm)
    x = (3 * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    scale, y = torch.linspace(0.5, 2, 5), torch.empty_like(x)
    for approx in (0, 1, -1):
        execute([gate_launch(ptx, x, y, scale)], readonly=[x, scale], unwritten=[y], approx=approx)
        assert error(y, gate_truth(x, scale)) < TOLERANCE[dtype]


@needs_nvcc
@every_target
def test_cuda_reduction_in_two_stages(sm):
    x = torch.randn(4, 3, 300, generator=torch.Generator().manual_seed(2))
    assert error(sums(compile_cuda(CUDA, sm), x, 2), x.double().sum((0, 2))) < 1e-5


@needs_nvcc
@every_target
def test_cuda_philox(sm):
    out, seed = torch.empty(100, 4, dtype=torch.int32), 0x123456789ABCDEF0
    execute([Launch(compile_cuda(CUDA, sm), "philox", (4,), (32,), 0, [out, seed, 100])], unwritten=[out])
    for i in range(100):
        c, k = [i, 1, 2, 3], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        assert [v & 0xFFFFFFFF for v in out[i].tolist()] == c


@needs_nvcc
@every_target
def test_cuda_fp64_and_slow_paths(sm):
    ptx = compile_cuda(CUDA, sm)
    x = torch.linspace(-8, 8, 200, dtype=torch.float64)
    y = torch.empty_like(x)
    run(load(ptx, "doubles"), [x, y, 200], (2,), (128,))
    want = torch.exp(-x * x) / (1 + x.abs().sqrt()) + x.tanh() + torch.log1p(x.abs()) + x.abs() ** 1.7
    assert error(y, want) < 1e-14
    x = torch.cat([torch.linspace(0.1, 5, 90), torch.logspace(2, 9, 38)])
    y = torch.empty_like(x)
    run(load(ptx, "wide_sine"), [x, y, 128], (1,), (128,))
    v = x.double()
    assert error(y, v.sin() + v**0.3 + torch.erf(v) + 1 / v) < 1e-6


@needs_nvcc
@every_target
def test_cuda_pairs_calls_and_atomics(sm):
    ptx = compile_cuda(CUDA, sm)
    g = torch.Generator().manual_seed(3)
    x, w = (torch.randn(64, 2, generator=g).bfloat16() for _ in range(2))
    h = torch.randn(64, 2, generator=g).half()
    y, out = torch.empty_like(x), torch.empty_like(h)
    run(load(ptx, "pairs"), [x, w, y, h, out, 64], (1,), (64,))
    assert error(y, (x.double() * w.double() + torch.maximum(x, w).double()).clamp(min=0)) < 5e-3
    assert error(out, h.double() ** 2 - h.double()) < 1e-3
    doubles = torch.empty(64, dtype=torch.float64)
    run(load(ptx, "calls"), [doubles], (1,), (64,))
    k = torch.arange(64, dtype=torch.float64)
    assert torch.equal(doubles, (k + 1) * k - (k + 1) / (k + 1))
    values = torch.randint(0, 1000, (500,), generator=g, dtype=torch.int32)
    counts, total = torch.zeros(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    run(load(ptx, "histogram"), [values, counts, total, 500], (4,), (128,))
    assert counts.tolist() == torch.bincount(values.long() % 16, minlength=16).tolist()
    assert total.item() == values.max().item()


@needs_nvcc
def test_cuda_last_block():
    def sums(*options):
        out, tickets = torch.zeros(64), torch.zeros(1, dtype=torch.int32)
        run(load(compile_cuda(CUDA, 90, options=options), "last_block"), [torch.zeros(256), out, tickets], (4,), (64,))
        return out, tickets.item()

    out, tickets = sums()
    assert torch.equal(out, 4 * torch.arange(64.0))
    assert tickets == 0  # ready for the next launch
    for plant in ("NO_BARRIER", "NO_FENCE"):
        with pytest.raises(Fault, match="race"):
            sums(f"-D{plant}")


@needs_nvcc
@pytest.mark.parametrize(
    ("plant", "kind"), [("NO_BARRIER", "race"), ("NO_MASK", "out-of-bounds"), ("LATE_STORE", "race")]
)
def test_cuda_planted_bugs(plant, kind):
    ptx = compile_cuda(CUDA, 90, options=[f"-D{plant}"])
    x = torch.randn(2, 3, 300)
    y, scale = torch.empty_like(x), torch.ones(3)
    with pytest.raises(Fault) as fault:
        execute([gate_launch(ptx, x, y, scale)], buffers=[x, y, scale]) if plant == "NO_MASK" else sums(ptx, x, 2)
    assert fault.value.kind == kind
    assert fault.value.line.startswith("source.cu:")


@needs_nvcc
def test_a_million_elements():
    """Speed: about a second on an idle core; the limit leaves room for a busy machine."""
    import time

    ptx = compile_cuda(CUDA, 80)
    x = torch.randn(4, 16, 16384)
    y, scale = torch.empty_like(x), torch.ones(16)
    launch = gate_launch(ptx, x, y, scale)
    start = time.process_time()
    execute([launch], readonly=[x, scale], unwritten=[y])
    assert time.process_time() - start < 10
    assert error(y, gate_truth(x, scale)) < 1e-6


def pointers(*names, dtype="fp32"):
    return dict.fromkeys(names, f"*{dtype}")


@needs_triton
@every_target
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_triton_elementwise(sm, dtype):
    from ptx import triton_samples as samples

    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    signature = pointers("x", "y", dtype=short) | pointers("scale") | dict.fromkeys(("channels", "inner", "n"), "i32")
    k = compile_triton(samples.gate, signature, {"BLOCK": 1024}, sm, divisible=["x", "y", "n"])
    x = (3 * torch.randn(3, 5, 208, generator=torch.Generator().manual_seed(1))).to(dtype)
    scale, y = torch.linspace(0.5, 2, 5), torch.empty_like(x)
    for approx in (0, 1, -1):
        launch = k.launch((-(-x.numel() // 1024),), x=x, y=y, scale=scale, channels=5, inner=208, n=x.numel())
        execute([launch], readonly=[x, scale], unwritten=[y], approx=approx)
        assert error(y, gate_truth(x, scale)) < TOLERANCE[dtype]


@needs_triton
@every_target
def test_triton_fp64_and_noise(sm):
    from ptx import triton_samples as samples

    x = torch.linspace(-8, 8, 200, dtype=torch.float64)
    y = torch.empty_like(x)
    k = compile_triton(samples.double_math, pointers("x", "y", dtype="fp64") | {"n": "i32"}, {"BLOCK": 256}, sm)
    execute([k.launch((1,), x=x, y=y, n=200)], unwritten=[y])
    assert error(y, torch.exp(-x * x) / (1 + x.abs().sqrt()) + x.tanh()) < 1e-14
    k = compile_triton(samples.noise, {"out": "*i32", "seed": "i32", "n": "i32"}, {"BLOCK": 256}, sm)
    out = torch.empty(300, dtype=torch.int32)
    execute([k.launch((2,), out=out, seed=7, n=300)], unwritten=[out])
    first = []
    for i in range(300):
        c, key = [i, 0, 0, 0], [7, 0]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ key[1], a & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        first.append(c[0])
    assert [v & 0xFFFFFFFF for v in out.tolist()] == first


@needs_triton
@every_target
def test_triton_reduction_in_two_stages(sm):
    from ptx import triton_samples as samples

    integers = {"columns": "i32", "splits": "i32"}
    first = compile_triton(samples.row_sums, pointers("x", "partial") | integers, {"BLOCK": 256}, sm)
    second = compile_triton(
        samples.finish, pointers("partial", "out") | {"splits": "i32"}, {"BLOCK": 16}, sm, num_warps=1
    )
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2))
    partial, out = torch.empty(3, 2), torch.empty(3)
    launches = [
        first.launch((3, 2), x=x, partial=partial, columns=1000, splits=2),
        second.launch((3,), partial=partial, out=out, splits=2),
    ]
    execute(launches, readonly=[x], unwritten=[partial, out])
    assert error(out, x.double().sum(1)) < 1e-5
    for broken in ("bar.sync", "bar.warp.sync"):  # every barrier of the reduction is needed
        lines = first.ptx.split("\n")
        places = [n for n, line in enumerate(lines) if line.strip().startswith(broken)]
        for n in places:
            launches[0].ptx = "\n".join(lines[:n] + lines[n + 1 :])
            with pytest.raises(Fault, match="race"):
                execute(launches, readonly=[x], unwritten=[partial, out])


@needs_triton
@every_target
def test_triton_last_program(sm):
    """Triton's atomics order programs if a barrier stands before them, and only then."""
    from ptx import triton_samples as samples

    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(3))
    partial, counter, out = torch.empty(7, 128), torch.zeros(1, dtype=torch.int32), torch.empty(128)
    signature = pointers("x", "partial", "out") | {"counter": "*i32"}
    for ordered in (True, False):
        k = compile_triton(samples.last_program, signature, {"ORDERED": ordered, "BLOCK": 128}, sm)
        launch = k.launch((7,), x=x, partial=partial, counter=counter, out=out)
        if ordered:
            execute([launch, launch], readonly=[x], unwritten=[partial, out])
            assert error(out, 2 * x.double().sum(0)) < 1e-5
            assert counter.item() == 0
        else:
            with pytest.raises(Fault, match="race"):
                execute([launch], readonly=[x], unwritten=[partial, out])


@needs_triton
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_triton_attention_tile(dtype):
    from ptx import triton_samples as samples

    k = compile_triton(
        samples.attention,
        pointers("q", "k", "v", "o", dtype=dtype) | {"length": "i32"},
        {"D": 64, "M": 32, "N": 32},
        80,
        divisible=["q", "k", "v", "o"],
    )
    assert "mma.sync" in k.ptx
    assert "cp.async" in k.ptx
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    g = torch.Generator().manual_seed(4)
    q, key, v = (torch.randn(50, 64, generator=g).to(kind) for _ in range(3))
    o = torch.empty_like(q)
    launch = k.launch((2,), q=q, k=key, v=v, o=o, length=50)
    for approx in (0, 1, -1):
        execute([launch], readonly=[q, key, v], unwritten=[o], approx=approx)
        want = torch.softmax(q.double() @ key.double().T * 0.125, -1) @ v.double()
        assert error(o, want) < {"fp16": 2e-3, "bf16": 2e-2, "fp32": 2e-3}[dtype]
    if (
        dtype == "bf16"
    ):  # dropping any wait or barrier is noticed, but for barriers before another one with no read between
        lines = k.ptx.split("\n")
        first_read = next(n for n, line in enumerate(lines) if "ldmatrix" in line or "ld.shared" in line)
        early = [n for n, line in enumerate(lines[:first_read]) if line.strip().startswith("bar.sync")]
        for n, line in enumerate(lines):
            if line.strip().startswith(("bar.sync", "cp.async.wait_group")) and n not in early[:-1]:
                launch.ptx = "\n".join(lines[:n] + lines[n + 1 :])
                with pytest.raises(Fault, match=r"race|async|unwritten"):
                    execute([launch], readonly=[q, key, v], unwritten=[o])
