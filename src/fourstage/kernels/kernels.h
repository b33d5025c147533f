// The kernels' building blocks: vectors of floats, a matrix product, RMSNorm, SwiGLU, threads.
//
// Matrices are row-major float32. Every width (floats in a row) is a multiple of 16; any number of
// rows will do. Nothing needs to be aligned. Each block of work is done by one thread and sums have
// a fixed order, so results don't depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a register
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * W), aligned(4), may_alias));

#define UNROLL _Pragma("GCC unroll 16")

inline vec load(const float* x) { return *(const vec*)x; }
inline void store(float* x, vec value) { *(vec*)x = value; }
inline vec all(float x) { return vec{} + x; }
inline int padded(int n) { return (n + 15) / 16 * 16; }

inline float sum(vec x) {
  float total = 0;
  UNROLL for (int i = 0; i < W; i++) total += x[i];
  return total;
}

inline float dot(const float* a, const float* b, int n) {
  vec total{};
  for (int i = 0; i < n; i += W) total += load(a + i) * load(b + i);
  return sum(total);
}

// e^x for x clamped to [-87, 88], to a relative error of 2e-7, as Cephes: 2^n e^r, |r| < ln(2) / 2.
inline vec exp(vec x) {
  x = x < all(-87.0f) ? all(-87.0f) : x;
  x = x > all(88.0f) ? all(88.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  vec n = (x * 1.44269504f + round) - round;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

// ---- matrix product

constexpr int ROWS = W == 8 ? 6 : 8;  // of a tile, whose sums take ROWS x 2 registers (AVX has 16)

// M rows and V registers of a product: y = x w, or y += x w for ADD. TRANSPOSED: x is [K, M].
template <int M, int V, bool TRANSPOSED, bool ADD>
inline void tile(const float* x, long x_row, int K, const float* w, long w_row, float* y,
                 long y_row) {
  vec sums[M][V];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < V; v++) sums[m][v] = ADD ? load(y + m * y_row + v * W) : vec{};
  for (int k = 0; k < K; k++) {
    vec row[V];
    UNROLL for (int v = 0; v < V; v++) row[v] = load(w + k * w_row + v * W);
    UNROLL for (int m = 0; m < M; m++) {
      float a = TRANSPOSED ? x[k * x_row + m] : x[m * x_row + k];
      UNROLL for (int v = 0; v < V; v++) sums[m][v] += a * row[v];
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < V; v++) store(y + m * y_row + v * W, sums[m][v]);
}

// The last n <= M rows.
template <int M, int V, bool TRANSPOSED, bool ADD, class... Rest>
inline void rest(int n, Rest... arguments) {
  if constexpr (M > 1) {
    if (n < M) rest<M - 1, V, TRANSPOSED, ADD>(n, arguments...);
    else tile<M, V, TRANSPOSED, ADD>(arguments...);
  } else if (n == 1) {
    tile<1, V, TRANSPOSED, ADD>(arguments...);
  }
}

// V registers of columns.
template <int V, bool TRANSPOSED, bool ADD>
void columns(const float* x, long x_row, int n, int K, const float* w, long w_row, float* y,
             long y_row) {
  const long step = TRANSPOSED ? 1 : x_row;
  int m = 0;
  for (; m + ROWS <= n; m += ROWS)
    tile<ROWS, V, TRANSPOSED, ADD>(x + m * step, x_row, K, w, w_row, y + m * y_row, y_row);
  rest<ROWS - 1, V, TRANSPOSED, ADD>(n - m, x + m * step, x_row, K, w, w_row, y + m * y_row, y_row);
}

// y [n, N] = x [n, K] w [K, N], or y += x w for ADD. TRANSPOSED: x is [K, n]. *_row: rows' strides.
template <bool ADD = false, bool TRANSPOSED = false>
void product(const float* x, long x_row, int n, int K, const float* w, long w_row, int N, float* y,
             long y_row) {
  int j = 0;
  for (; j + 2 * W <= N; j += 2 * W)
    columns<2, TRANSPOSED, ADD>(x, x_row, n, K, w + j, w_row, y + j, y_row);
  if (j < N) columns<1, TRANSPOSED, ADD>(x, x_row, n, K, w + j, w_row, y + j, y_row);
}

// ---- rows

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_rms(const float* x, int n, float eps) {
  return 1.0f / std::sqrt(dot(x, x, n) / n + eps);
}

inline void rms_norm(const float* x, int n, int D, const float* gain, float eps, float* y) {
  for (; n--; x += D, y += D) {
    float scale = inverse_rms(x, D, eps);
    for (int i = 0; i < D; i += W) store(y + i, load(x + i) * scale * load(gain + i));
  }
}

// y = one head x, times scale and gain, rotated; all [C]. The first half of sin has its minus sign
// already (model/attention.py). y may be x.
inline void rotate(const float* x, float scale, const float* gain, const float* cos,
                   const float* sin, int C, float* y) {
  const int half = C / 2;
#pragma GCC ivdep
  for (int i = 0; i < half; i++) {
    const float a = x[i] * scale * gain[i], b = x[i + half] * scale * gain[i + half];
    y[i] = a * cos[i] + b * sin[i];
    y[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// y [n, F] = silu(gate) * up, for gate_up [n, 2 F]
inline void swiglu(const float* gate_up, int n, int F, float* y) {
  for (; n--; gate_up += 2 * F, y += F)
    for (int i = 0; i < F; i += W) {
      vec gate = load(gate_up + i);
      store(y + i, gate * sigmoid(gate) * load(gate_up + F + i));
    }
}

// Of one row: active [F] = silu(gate) * up; grad_gate_up [2 F] from its gradient, grad [F] * factor
inline void swiglu_backward(const float* gate_up, const float* grad, float factor, int F,
                            float* grad_gate_up, float* active) {
  for (int i = 0; i < F; i += W) {
    vec gate = load(gate_up + i), up = load(gate_up + F + i), s = sigmoid(gate);
    vec d = load(grad + i) * factor;
    store(grad_gate_up + i, d * up * s * (1.0f + gate * (1.0f - s)));
    store(grad_gate_up + F + i, d * gate * s);
    store(active + i, gate * s * up);
  }
}

// In place: softmax of x[from, to), 0 elsewhere in x[0, end). Returns log(sum(exp(scores))).
inline float softmax(float* x, int from, int to, int end) {
  const int first = from / W * W, past = (to + W - 1) / W * W;
  std::fill(x, x + from, -INFINITY);
  std::fill(x + to, x + past, -INFINITY);
  vec most = load(x + first), total{};
  for (int i = first + W; i < past; i += W) most = load(x + i) > most ? load(x + i) : most;
  float top = most[0];
  for (int i = 1; i < W; i++) top = std::max(top, most[i]);
  for (int i = first; i < past; i += W) {
    vec e = exp(load(x + i) - top);
    total += e;
    store(x + i, e);
  }
  const float whole = sum(total), share = 1.0f / whole;
  for (int i = first; i < past; i += W) store(x + i, load(x + i) * share);
  std::fill(x, x + from, 0.0f);
  std::fill(x + to, x + end, 0.0f);
  return top + std::log(whole);
}

// total [width] = the sum of n parts in their order, which lie part_step floats apart
inline void add_up(const float* parts, long part_step, int n, long width, float* total) {
  std::fill(total, total + width, 0.0f);
  for (; n--; parts += part_step)
    for (long i = 0; i < width; i += W) store(total + i, load(total + i) + load(parts + i));
}

// y [n, m] = x [m, n] transposed
inline void transpose(const float* x, long x_row, int m, int n, float* y, long y_row) {
  for (int i0 = 0; i0 < m; i0 += 16)
    for (int j0 = 0; j0 < n; j0 += 16)
      for (int j = j0; j < std::min(n, j0 + 16); j++)
        for (int i = i0; i < std::min(m, i0 + 16); i++) y[j * y_row + i] = x[i * x_row + j];
}

// ---- memory, aligned so that no vector crosses a cache line

struct Free {
  void operator()(float* x) const { std::free(x); }
};

using Floats = std::unique_ptr<float[], Free>;

inline Floats floats(long n) {
  void* memory = std::aligned_alloc(64, (n * 4 + 63) / 64 * 64);
  if (!memory && n) throw std::bad_alloc();
  return Floats((float*)memory);
}

// ---- threads

// Calls body(0), .., body(n - 1), each on one thread; rethrows an exception of one of them.
template <class Body>
void in_parallel(int n, int threads, Body body) {
  std::exception_ptr thrown;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && n > 1)
  for (int i = 0; i < n; i++) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical
      thrown = std::current_exception();
    }
  }
  if (thrown) std::rethrow_exception(thrown);
}

constexpr int BLOCK = 64;  // tokens, a thread's piece of work

inline int blocks(int N) { return (N + BLOCK - 1) / BLOCK; }

// Calls body(block, first, last) for all blocks of N tokens, first to last - 1.
template <class Body>
void in_blocks(int N, int threads, Body body) {
  in_parallel(blocks(N), threads, [&](int block) {
    body(block, (long)block * BLOCK, std::min<long>(N, (block + 1L) * BLOCK));
  });
}

// ---- errors

// What every kernel returns: null, or the reason of a failure, which Python raises.
typedef const char* Error;

template <class Body>
Error guarded(Body body) {
  static thread_local char text[200];
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "no memory";  // build.py knows these words
  } catch (const std::exception& error) {
    std::snprintf(text, sizeof text, "%s", error.what());
    return text;
  }
}

inline void require(bool condition, const char* otherwise) {
  if (!condition) throw std::invalid_argument(otherwise);
}
