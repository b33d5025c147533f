// y = x w^T and its gradients.
//
// Shape legend: N tokens, D width of x, F width of y.
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
