// RMSNorm, and norm and rotation of heads, with their gradients: a pass over memory each.
//
// Shape legend: N tokens, D d_model, J heads of a token in memory (queries, keys, values), C
// head_dim, T positions.
#include "kernels.h"

namespace {

constexpr int BLOCK = 64;  // tokens, a thread's piece of work

int blocks(int n) { return (n + BLOCK - 1) / BLOCK; }

// total [width] = what the blocks of rows summed, in their order
void add_up(const float* parts, int n, int width, float* total) {
  std::fill(total, total + width, 0.0f);
  for (; n--; parts += width)
    for (int i = 0; i < width; i += W) store(total + i, load(total + i) + load(parts + i));
}

// grad_x of n = x * scale, scale = 1 / rms(x), from grad_n
inline void rms_backward(const float* x, const float* grad_n, int D, float scale, float* grad_x) {
  float mean = dot(grad_n, x, D) * scale / D;
  for (int i = 0; i < D; i += W)
    store(grad_x + i, scale * (load(grad_n + i) - load(x + i) * scale * mean));
}

}  // namespace

extern "C" {

Error rms_norm_forward(int threads, int N, int D, const float* x, const float* gain, float eps,
                       float* y) try {
  in_parallel(blocks(N), threads, [&](int block) {
    const long first = (long)block * BLOCK;
    rms_norm(x + first * D, std::min<long>(BLOCK, N - first), D, gain, eps, y + first * D);
  });
  return nullptr;
} catch (...) {
  return reason();
}

Error rms_norm_backward(int threads, int N, int D, const float* x, const float* gain, float eps,
                        const float* grad, float* grad_x, float* grad_gain) try {
  auto parts = floats((long)blocks(N) * D);
  in_parallel(blocks(N), threads, [&](int block) {
    auto grad_n = floats(D);
    float* part = parts.get() + (long)block * D;
    std::fill(part, part + D, 0.0f);
    for (long n = (long)block * BLOCK; n < std::min(N, (block + 1) * BLOCK); n++) {
      const float *row = x + n * D, *g = grad + n * D, scale = inverse_rms(row, D, eps);
      for (int i = 0; i < D; i += W) {
        store(part + i, load(part + i) + load(g + i) * load(row + i) * scale);
        store(grad_n.get() + i, load(g + i) * load(gain + i));
      }
      rms_backward(row, grad_n.get(), D, scale, grad_x + n * D);
    }
  });
  add_up(parts.get(), blocks(N), D, grad_gain);
  return nullptr;
} catch (...) {
  return reason();
}

// Queries and keys (the first n_qk of J heads) are normalised, times gain [n_qk, C], and rotated;
// token n stands at position n % T of cos and sin [T, C]. Values are copied.
Error heads_forward(int threads, int N, int T, int J, int n_qk, int C, const float* qkv,
                    const float* gain, const float* cos, const float* sin, float eps,
                    float* y) try {
  in_parallel(blocks(N), threads, [&](int block) {
    const int half = C / 2;
    for (long n = (long)block * BLOCK; n < std::min(N, (block + 1) * BLOCK); n++) {
      const float *c = cos + n % T * C, *s = sin + n % T * C;
      for (int j = 0; j < n_qk; j++) {
        const float *x = qkv + (n * J + j) * C, *w = gain + j * C, scale = inverse_rms(x, C, eps);
        float* to = y + (n * J + j) * C;
        for (int i = 0; i < half; i++) {
          const float a = x[i] * scale * w[i], b = x[i + half] * scale * w[i + half];
          to[i] = a * c[i] + b * s[i];
          to[i + half] = b * c[i + half] + a * s[i + half];
        }
      }
      const long values = (n * J + n_qk) * C;
      std::copy(qkv + values, qkv + (n + 1) * J * C, y + values);
    }
  });
  return nullptr;
} catch (...) {
  return reason();
}

Error heads_backward(int threads, int N, int T, int J, int n_qk, int C, const float* qkv,
                     const float* gain, const float* cos, const float* sin, float eps,
                     const float* grad, float* grad_qkv, float* grad_gain) try {
  const int half = C / 2, width = n_qk * C;
  auto parts = floats((long)blocks(N) * width);
  in_parallel(blocks(N), threads, [&](int block) {
    auto grad_n = floats(C);
    float* part = parts.get() + (long)block * width;
    std::fill(part, part + width, 0.0f);
    for (long n = (long)block * BLOCK; n < std::min(N, (block + 1) * BLOCK); n++) {
      const float *c = cos + n % T * C, *s = sin + n % T * C;
      for (int j = 0; j < n_qk; j++) {
        const long at = (n * J + j) * C;
        const float *x = qkv + at, *g = grad + at, *w = gain + j * C;
        const float scale = inverse_rms(x, C, eps);
        float *turned = grad_n.get(), *p = part + j * C;
        for (int i = 0; i < half; i++) {
          const float a = g[i] * c[i] + g[i + half] * s[i + half];
          const float b = g[i + half] * c[i + half] + g[i] * s[i];
          p[i] += a * x[i] * scale;
          p[i + half] += b * x[i + half] * scale;
          turned[i] = a * w[i];
          turned[i + half] = b * w[i + half];
        }
        rms_backward(x, turned, C, scale, grad_qkv + at);
      }
      const long values = (n * J + n_qk) * C;
      std::copy(grad + values, grad + (n + 1) * J * C, grad_qkv + values);
    }
  });
  add_up(parts.get(), blocks(N), width, grad_gain);
  return nullptr;
} catch (...) {
  return reason();
}

}  // extern "C"
