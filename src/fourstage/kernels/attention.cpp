// Causal attention and its gradient. A chunk of queries meets all its keys at once. The scores stay
// in a core's cache and are computed again for the gradient (Dao et al. 2022, arXiv 2205.14135,
// without its blocks of keys).
//
// Shape legend: B rows, T tokens, H query heads, G key/value heads, R = H / G, J = H + 2 G, C
// head_dim, S = T rounded up to a multiple of 16.
#include "kernels.h"

constexpr int CHUNK = 32;  // queries

// y [S, C]: x [T, C] and then rows of 0
static void copy(const float* x, long x_row, int T, int S, int C, float* y) {
  for (int t = 0; t < T; t++) std::memcpy(y + (long)t * C, x + t * x_row, C * sizeof(float));
  std::fill(y + (long)T * C, y + (long)S * C, 0.0f);
}

// y [C, S]: x [T, C] transposed, and then columns of 0
static void copy_transposed(const float* x, long x_row, int T, int S, int C, float* y) {
  transpose(x, x_row, T, C, y, S);
  for (int c = 0; c < C; c++) std::fill(y + (long)c * S + T, y + (long)(c + 1) * S, 0.0f);
}

// G of J = H + 2 G heads
static int groups(int J, int H) {
  const int G = (J - H) / 2;
  require(H > 0 && G > 0 && J == H + 2 * G && H % G == 0, "query heads and others form no groups");
  return G;
}

// qkv [B, T, J, C], queries already divided by sqrt(C) -> y [B, T, H, C], and log_sums [B, H, T]:
// log(sum(exp)) of each query's scores.
extern "C" Error attention_forward(int threads, int B, int T, int J, int C, int H, const float* qkv,
                                   float* y, float* log_sums) {
  return guarded([&] {
    const int S = padded(T), G = groups(J, H), R = H / G;
    const long token = (long)J * C, y_token = (long)H * C;
    in_parallel(B * G, threads, [&](int i) {
      const int b = i / G, g = i % G;
      const float* row = qkv + b * T * token;
      auto memory = floats((long)S * (2 * C + CHUNK));
      float *k_transposed = memory.get(), *v = k_transposed + S * C, *p = v + S * C;
      copy_transposed(row + (H + g) * C, token, T, S, C, k_transposed);
      copy(row + (H + G + g) * C, token, T, S, C, v);
      for (int h = g * R; h < (g + 1) * R; h++)
        for (int t = 0; t < T; t += CHUNK) {
          const int n = std::min(CHUNK, T - t), end = padded(t + n);
          product(row + t * token + h * C, token, n, C, k_transposed, S, end, p, S);
          for (int m = 0; m < n; m++)
            log_sums[((long)b * H + h) * T + t + m] = softmax(p + (long)m * S, 0, t + m + 1, end);
          product(p, S, n, end, v, C, C, y + (b * T + t) * y_token + h * C, y_token);
        }
    });
  });
}

extern "C" Error attention_backward(int threads, int B, int T, int J, int C, int H,
                                    const float* qkv, const float* y, const float* log_sums,
                                    const float* grad, float* grad_qkv) {
  return guarded([&] {
    const int S = padded(T), G = groups(J, H), R = H / G;
    const long token = (long)J * C, y_token = (long)H * C;
    in_parallel(B * G, threads, [&](int i) {
      const int b = i / G, g = i % G;
      const float* row = qkv + b * T * token;
      float* grad_row = grad_qkv + b * T * token;
      auto memory = floats((long)S * (5 * C + 2 * CHUNK));
      float *k = memory.get(), *k_transposed = k + S * C, *v_transposed = k_transposed + S * C;
      float *grad_k = v_transposed + S * C, *grad_v = grad_k + S * C, *p = grad_v + S * C;
      float* grad_s = p + S * CHUNK;
      copy(row + (H + g) * C, token, T, S, C, k);
      copy_transposed(row + (H + g) * C, token, T, S, C, k_transposed);
      copy_transposed(row + (H + G + g) * C, token, T, S, C, v_transposed);
      std::fill(grad_k, grad_k + 2L * S * C, 0.0f);
      for (int h = g * R; h < (g + 1) * R; h++)
        for (int t = 0; t < T; t += CHUNK) {
          const int n = std::min(CHUNK, T - t), end = padded(t + n);
          const float* q = row + t * token + h * C;
          const long at = (b * T + t) * y_token + h * C;
          product(q, token, n, C, k_transposed, S, end, p, S);
          product(grad + at, y_token, n, C, v_transposed, S, end, grad_s, S);
          for (int m = 0; m < n; m++) {
            const float log_sum = log_sums[((long)b * H + h) * T + t + m];
            const float mean = dot(grad + at + m * y_token, y + at + m * y_token, C);
            float *p_m = p + (long)m * S, *s_m = grad_s + (long)m * S;
            std::fill(p_m + t + m + 1, p_m + end, -INFINITY);
            for (int j = 0; j < end; j += W) {
              vec share = exp(load(p_m + j) - log_sum);
              store(p_m + j, share);
              store(s_m + j, share * (load(s_m + j) - mean));
            }
            std::fill(p_m + t + m + 1, p_m + end, 0.0f);
            std::fill(s_m + t + m + 1, s_m + end, 0.0f);
          }
          product(grad_s, S, n, end, k, C, C, grad_row + t * token + h * C, token);
          product<true, true>(p, S, end, n, grad + at, y_token, C, grad_v, C);
          product<true, true>(grad_s, S, end, n, q, token, C, grad_k, C);
        }
      for (int t = 0; t < T; t++) {
        std::memcpy(grad_row + t * token + (H + g) * C, grad_k + t * C, C * sizeof(float));
        std::memcpy(grad_row + t * token + (H + G + g) * C, grad_v + t * C, C * sizeof(float));
      }
    });
  });
}
