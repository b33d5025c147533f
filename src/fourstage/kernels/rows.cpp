// RMSNorm, and norm and rotation of heads, with their gradients: one pass over memory each.
//
// Shape legend: N tokens, D d_model, B rows, T tokens of a row, J heads of a token (queries, keys,
// values), C head_dim, Q heads with a norm (queries and keys, which come first).
#include "kernels.h"

// grad_x for n = x * scale, scale = 1 / rms(x), from grad_n
static void rms_backward(const float* x, const float* grad_n, int D, float scale, float* grad_x) {
  float mean = dot(grad_n, x, D) * scale / D;
  for (int i = 0; i < D; i += W)
    store(grad_x + i, scale * (load(grad_n + i) - load(x + i) * scale * mean));
}

extern "C" Error rms_norm_forward(int threads, int N, int D, const float* x, const float* gain,
                                  float eps, float* y) {
  return guarded([&] {
    in_blocks(N, threads, [&](int, long first, long last) {
      rms_norm(x + first * D, last - first, D, gain, eps, y + first * D);
    });
  });
}

extern "C" Error rms_norm_backward(int threads, int N, int D, const float* x, const float* gain,
                                   const float* grad, float eps, float* grad_x, float* grad_gain) {
  return guarded([&] {
    auto parts = floats((long)blocks(N) * D);
    in_blocks(N, threads, [&](int block, long first, long last) {
      auto grad_n = floats(D);
      float* part = parts.get() + (long)block * D;
      std::fill(part, part + D, 0.0f);
      for (long n = first; n < last; n++) {
        const float *row = x + n * D, *g = grad + n * D, scale = inverse_rms(row, D, eps);
        for (int i = 0; i < D; i += W) {
          store(part + i, load(part + i) + load(g + i) * load(row + i) * scale);
          store(grad_n.get() + i, load(g + i) * load(gain + i));
        }
        rms_backward(row, grad_n.get(), D, scale, grad_x + n * D);
      }
    });
    add_up(parts.get(), D, blocks(N), D, grad_gain);
  });
}

// The first Q of J heads are normalised, multiplied by gain [Q, C] and rotated by cos and sin
// [T, C]; the others are copied.
extern "C" Error heads_forward(int threads, int B, int T, int J, int C, int Q, const float* qkv,
                               const float* gain, const float* cos, const float* sin, float eps,
                               float* y) {
  return guarded([&] {
    require(Q <= J, "more gains than heads");
    in_blocks(B * T, threads, [&](int, long first, long last) {
      for (long n = first; n < last; n++) {
        const long place = n % T * C;
        for (int j = 0; j < Q; j++) {
          const long at = (n * J + j) * C;
          rotate(qkv + at, inverse_rms(qkv + at, C, eps), gain + j * C, cos + place, sin + place, C,
                 y + at);
        }
        const long others = (n * J + Q) * C;
        std::copy(qkv + others, qkv + (n + 1) * J * C, y + others);
      }
    });
  });
}

extern "C" Error heads_backward(int threads, int B, int T, int J, int C, int Q, const float* qkv,
                                const float* gain, const float* cos, const float* sin,
                                const float* grad, float eps, float* grad_qkv, float* grad_gain) {
  return guarded([&] {
    require(Q <= J, "more gains than heads");
    const int N = B * T, half = C / 2, width = Q * C;
    auto parts = floats((long)blocks(N) * width);
    in_blocks(N, threads, [&](int block, long first, long last) {
      auto grad_n = floats(C);
      float* part = parts.get() + (long)block * width;
      std::fill(part, part + width, 0.0f);
      for (long n = first; n < last; n++) {
        const float *c = cos + n % T * C, *s = sin + n % T * C;
        for (int j = 0; j < Q; j++) {
          const long at = (n * J + j) * C;
          const float *x = qkv + at, *g = grad + at, *w = gain + j * C;
          const float scale = inverse_rms(x, C, eps);
          float *unrotated = grad_n.get(), *p = part + j * C;
          for (int i = 0; i < half; i++) {
            const float a = g[i] * c[i] + g[i + half] * s[i + half];
            const float b = g[i + half] * c[i + half] + g[i] * s[i];
            p[i] += a * x[i] * scale;
            p[i + half] += b * x[i + half] * scale;
            unrotated[i] = a * w[i];
            unrotated[i + half] = b * w[i + half];
          }
          rms_backward(x, unrotated, C, scale, grad_qkv + at);
        }
        const long others = (n * J + Q) * C;
        std::copy(grad + others, grad + (n + 1) * J * C, grad_qkv + others);
      }
    });
    add_up(parts.get(), width, blocks(N), width, grad_gain);
  });
}
