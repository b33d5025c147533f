// Products of whole matrices: a Linear, y = x w^T, with its gradients; and Muon's Newton-Schulz
// iterations, for all of which a matrix stays in a core's cache.
//
// Shape legend: N tokens, D width of x, F width of y; M matrices, R rows, C columns, R >= C,
// I iterations, L = 3 coefficients of each.
#include "kernels.h"

constexpr int PARTS = 16;  // at most: each sums the gradient of the weight over some of the tokens

extern "C" Error linear_forward(int threads, int N, int D, int F, const float* x, const float* w,
                                float* y) {
  return guarded([&] {
    auto transposed = floats((long)D * F);
    in_parallel(F / 16, threads, [&](int i) {
      transpose(w + i * 16L * D, D, 16, D, transposed.get() + i * 16, F);
    });
    in_blocks(N, threads, [&](int, long first, long last) {
      product(x + first * D, D, last - first, D, transposed.get(), F, F, y + first * F, F);
    });
  });
}

extern "C" Error linear_backward(int threads, int N, int D, int F, const float* x, const float* w,
                                 const float* grad, float* grad_x, float* grad_w) {
  return guarded([&] {
    const int parts = std::min(PARTS, blocks(N));
    const long size = (long)F * D;
    auto grads = floats(parts * size);
    in_parallel(parts, threads, [&](int part) {
      float* to = grads.get() + part * size;
      std::fill(to, to + size, 0.0f);
      for (int block = part * blocks(N) / parts; block < (part + 1) * blocks(N) / parts; block++) {
        const long first = (long)block * BLOCK;
        const int n = std::min<long>(BLOCK, N - first);
        const float *rows = x + first * D, *g = grad + first * F;
        product(g, F, n, F, w, D, D, grad_x + first * D, D);
        product<true, true>(g, F, F, n, rows, D, D, to, D);
      }
    });
    in_parallel(F, threads, [&](int f) {
      add_up(grads.get() + (long)f * D, size, parts, D, grad_w + (long)f * D);
    });
  });
}

// x [M, R, C], each of norm 1 -> y, about U V^T of each U S V^T. An iteration with the next row
// (a, b, c) of coefficients [I, L]: y <- a y + y (b g + c g g), g = y^T y.
extern "C" Error newton_schulz(int threads, int M, int R, int C, int I, int L,
                               const float* x, const float* coefficients, float* y) {
  return guarded([&] {
    require(L == 3, "an iteration has three coefficients");
    in_parallel(M, threads, [&](int matrix) {
      auto memory = floats((long)C * (2 * C + R));
      float *gram = memory.get(), *factor = gram + C * C, *step = factor + C * C;
      float* rows = y + (long)matrix * R * C;
      std::copy_n(x + (long)matrix * R * C, (long)R * C, rows);
      for (int i = 0; i < I; i++) {
        const float *abc = coefficients + L * i, a = abc[0], b = abc[1], c = abc[2];
        product<false, true>(rows, C, C, R, rows, C, C, gram, C);
        product(gram, C, C, C, gram, C, C, factor, C);
        for (long j = 0; j < (long)C * C; j += W)
          store(factor + j, b * load(gram + j) + c * load(factor + j));
        product(rows, C, R, C, factor, C, C, step, C);
        for (long j = 0; j < (long)R * C; j += W)
          store(rows + j, a * load(rows + j) + load(step + j));
      }
    });
  });
}
