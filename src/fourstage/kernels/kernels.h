// What the kernels are made of: vectors of floats, a matrix product, RMSNorm and SwiGLU.
//
// Matrices are rows of floats, one after the other. Every width (a row's number of floats) is a
// multiple of 16; numbers of rows are free. Nothing needs to be aligned.
// One thread works on a call, in one order of additions: results do not depend on the threads.
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

// e^x to 2e-7 of its value, as in Cephes: 2^n e^r with |r| < ln(2) / 2. Below -87 it is e^-87.
inline vec exp(vec x) {
  x = x < all(-87.0f) ? all(-87.0f) : x;
  x = x > all(88.0f) ? all(88.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
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

constexpr int ROWS = W == 8 ? 6 : 8;  // of a tile: ROWS x 2 registers hold its sums (AVX has 16)

// M rows and V registers of a product: y = x w, or y += x w. TURNED: x is [K, M].
template <int M, int V, bool TURNED, bool ADD>
inline void tile(const float* x, long x_row, int K, const float* w, long w_row, float* y,
                 long y_row) {
  vec sums[M][V];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < V; v++) sums[m][v] = ADD ? load(y + m * y_row + v * W) : vec{};
  for (int k = 0; k < K; k++) {
    vec row[V];
    UNROLL for (int v = 0; v < V; v++) row[v] = load(w + k * w_row + v * W);
    UNROLL for (int m = 0; m < M; m++) {
      float a = TURNED ? x[k * x_row + m] : x[m * x_row + k];
      UNROLL for (int v = 0; v < V; v++) sums[m][v] += a * row[v];
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < V; v++) store(y + m * y_row + v * W, sums[m][v]);
}

// The last rows, fewer than M.
template <int M, int V, bool TURNED, bool ADD, class... Rest>
inline void rest(int n, Rest... arguments) {
  if constexpr (M > 1) {
    if (n < M) rest<M - 1, V, TURNED, ADD>(n, arguments...);
    else tile<M, V, TURNED, ADD>(arguments...);
  } else if (n == 1) {
    tile<1, V, TURNED, ADD>(arguments...);
  }
}

template <int V, bool TURNED, bool ADD>
void columns(const float* x, long x_row, int n, int K, const float* w, long w_row, float* y,
             long y_row) {
  const long step = TURNED ? 1 : x_row;
  int m = 0;
  for (; m + ROWS <= n; m += ROWS)
    tile<ROWS, V, TURNED, ADD>(x + m * step, x_row, K, w, w_row, y + m * y_row, y_row);
  rest<ROWS - 1, V, TURNED, ADD>(n - m, x + m * step, x_row, K, w, w_row, y + m * y_row, y_row);
}

// y [n, N] = x [n, K] w [K, N], or y += x w. TURNED: x is [K, n]. *_row: from one row to the next.
template <bool ADD = false, bool TURNED = false>
void product(const float* x, long x_row, int n, int K, const float* w, long w_row, int N, float* y,
             long y_row) {
  int j = 0;
  for (; j + 2 * W <= N; j += 2 * W)
    columns<2, TURNED, ADD>(x, x_row, n, K, w + j, w_row, y + j, y_row);
  if (j < N) columns<1, TURNED, ADD>(x, x_row, n, K, w + j, w_row, y + j, y_row);
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

// y [n, F] = silu(gate) * up, for gate_up [n, 2 F]
inline void swiglu(const float* gate_up, int n, int F, float* y) {
  for (; n--; gate_up += 2 * F, y += F)
    for (int i = 0; i < F; i += W) {
      vec gate = load(gate_up + i);
      store(y + i, gate * sigmoid(gate) * load(gate_up + F + i));
    }
}

// Of one row: grad_gate_up [2 F], and active [F] = silu(gate) * up, from grad [F] * factor
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

// In place: softmax of the first `seen` scores, 0 in the others. Returns log(sum(exp(scores))).
inline float softmax(float* x, int seen, int end) {
  const int past = (seen + W - 1) / W * W;
  std::fill(x + seen, x + past, -INFINITY);
  vec most = load(x), total{};
  for (int i = W; i < past; i += W) most = load(x + i) > most ? load(x + i) : most;
  float top = most[0];
  for (int i = 1; i < W; i++) top = std::max(top, most[i]);
  for (int i = 0; i < past; i += W) {
    vec e = exp(load(x + i) - top);
    if (i + W > seen)
      for (int j = seen - i; j < W; j++) e[j] = 0;
    total += e;
    store(x + i, e);
  }
  const float whole = sum(total), share = 1.0f / whole;
  for (int i = 0; i < past; i += W) store(x + i, load(x + i) * share);
  std::fill(x + past, x + end, 0.0f);
  return top + std::log(whole);
}

// y [n, m] = x [m, n] turned
inline void turn(const float* x, long x_row, int m, int n, float* y, long y_row) {
  for (int i0 = 0; i0 < m; i0 += 16)
    for (int j0 = 0; j0 < n; j0 += 16)
      for (int j = j0; j < std::min(n, j0 + 16); j++)
        for (int i = i0; i < std::min(m, i0 + 16); i++) y[j * y_row + i] = x[i * x_row + j];
}

// ---- memory, where no vector lies in two cache lines

struct Free {
  void operator()(float* x) const { std::free(x); }
};

inline std::unique_ptr<float[], Free> floats(long n) {
  void* memory = std::aligned_alloc(64, (n * 4 + 63) / 64 * 64);
  if (!memory && n) throw std::bad_alloc();
  return std::unique_ptr<float[], Free>((float*)memory);
}

// ---- threads

// Calls body(0), .., body(n - 1), each by one thread; throws what one of them threw.
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

// ---- errors

// What every kernel returns: null, or the reason of a failure, which Python raises.
typedef const char* Error;

// Of the exception that is caught.
inline Error reason() {
  static thread_local char text[200];
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return "no memory";  // as build.py knows it
  } catch (const std::exception& error) {
    std::snprintf(text, sizeof text, "%s", error.what());
    return text;
  } catch (...) {
    return "an unknown exception";
  }
}
