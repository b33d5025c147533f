// y = x w^T and its gradients.
//
// Shape legend: N tokens, D width of x, F width of y.
#include "kernels.h"

namespace {

constexpr int BLOCK = 64;  // tokens at once
constexpr int PARTS = 16;  // at most: each sums the gradient of the weight for some of the tokens

}  // namespace

extern "C" {

Error linear_forward(int threads, int N, int D, int F, const float* x, const float* w,
                     float* y) try {
  auto turned = floats((long)D * F);
  in_parallel(F / 16, threads, [&](int i) {
    turn(w + i * 16L * D, D, 16, D, turned.get() + i * 16, F);
  });
  in_parallel((N + BLOCK - 1) / BLOCK, threads, [&](int block) {
    const long first = (long)block * BLOCK;
    const int n = std::min<long>(BLOCK, N - first);
    product(x + first * D, D, n, D, turned.get(), F, F, y + first * F, F);
  });
  return nullptr;
} catch (...) {
  return reason();
}

Error linear_backward(int threads, int N, int D, int F, const float* x, const float* w,
                      const float* grad, float* grad_x, float* grad_w) try {
  const int blocks = (N + BLOCK - 1) / BLOCK, parts = std::min(PARTS, blocks);
  const long size = (long)F * D;
  auto grads = floats(parts * size);
  in_parallel(parts, threads, [&](int part) {
    float* to = grads.get() + part * size;
    std::fill(to, to + size, 0.0f);
    for (int block = part * blocks / parts; block < (part + 1) * blocks / parts; block++) {
      const long first = (long)block * BLOCK;
      const int n = std::min<long>(BLOCK, N - first);
      const float *rows = x + first * D, *g = grad + first * F;
      product(g, F, n, F, w, D, D, grad_x + first * D, D);
      product<true, true>(g, F, F, n, rows, D, D, to, D);
    }
  });
  in_parallel(F, threads, [&](int f) {
    float* to = grad_w + (long)f * D;
    std::fill(to, to + D, 0.0f);
    for (int part = 0; part < parts; part++) {
      const float* from = grads.get() + part * size + (long)f * D;
      for (int i = 0; i < D; i += W) store(to + i, load(to + i) + load(from + i));
    }
  });
  return nullptr;
} catch (...) {
  return reason();
}

}  // extern "C"
