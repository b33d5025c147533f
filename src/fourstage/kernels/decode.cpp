// Generation: T new tokens for each of n rows, whose keys and values are kept, through all layers.
//
// A chunk of rows passes all layers on one thread: its activations stay in that core's cache, and no
// thread waits for another. What a row gets depends on no other row.
//
// B rows of a chunk, T new tokens of each, N = B T, D d_model, H query heads, G key/value heads,
// J = H + 2 G, C head_dim, S places of a row (a multiple of 16), E experts, K chosen ones,
// F an expert's hidden width, V vocabulary; *_16 rounded up to a multiple of 16.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace {

constexpr int CHUNK = 256;  // tokens: few enough for the cache, enough to read weights seldom
constexpr int PANEL = 32;  // columns of a weight
constexpr long LARGE = 1 << 17;  // numbers of a weight, above which it leaves a core's cache

struct Layer {  // the same as in kernel_steps.py, as is Model
  const float* attention_gain;  // [D]
  const float* qkv;             // [D, J C]
  const float* head_gain;       // [H + G, C]; of the queries with the 1 / sqrt(C) of attention
  const float* out;             // [H C, D]
  const float* mlp_gain;        // [D]
  const float* router;          // [D, E_16], null in a dense model
  const float* bias;            // [E]
  const float* gate_up;         // [E, D, 2 F]
  const float* down;            // [E, F, D]
  const float* shared_gate_up;  // [D, 2 d_shared]
  const float* shared_down;     // [d_shared, D]
};

struct Model {
  int32_t n_layers, D, H, G, C, E, K, F, d_shared, V_16, S, has_norm;
  float eps, route_scale;
  const Layer* layers;
  const float *gain, *head;  // [D], [D, V_16]
  const float *cos, *sin;    // [S, C / 2]
};

struct Scratch {
  using Floats = decltype(floats(0));
  Floats h, qkv, y, weights, scores, gates, x, gate_up, act, panel;
  std::vector<int> chosen, copies, rows;

  Scratch(const Model& m, int B, long N)
      : h(floats(N * m.D)),
        qkv(floats(N * (m.H + 2 * m.G) * m.C)),
        y(floats(N * std::max(m.H * m.C, m.D))),
        weights(floats((long)std::max(ROWS, m.H / m.G) * m.S)),
        scores(floats(N * padded(m.E))),
        gates(floats(N * m.K)),
        x(floats(N * m.D)),
        gate_up(floats(N * 2 * std::max(m.F, m.d_shared))),
        act(floats(N * std::max(m.F, m.d_shared))),
        panel(floats(PANEL * (long)std::max({m.D, m.H * m.C, m.F, m.d_shared}))),
        chosen(N * m.K),
        copies(N),
        rows(B + 1) {}
};

// y [n, N] = x [n, K] w [K, N], or y += for ADD. For many rows the part of a large w that is read
// again and again is first brought together: lines far apart crowd each other out of the cache.
template <bool ADD = false>
void multiply(const float* x, int n, int K, const float* w, long w_row, int N, float* y, long y_row,
              Scratch& s) {
  if (n <= ROWS || K * w_row <= LARGE) return product<ADD>(x, K, n, K, w, w_row, N, y, y_row);
  for (int j = 0; j < N; j += PANEL) {
    const int width = std::min(PANEL, N - j);
    float* panel = s.panel.get();
    for (int k = 0; k < K; k++)
      for (int i = 0; i < width; i += W) store(panel + k * width + i, load(w + k * w_row + j + i));
    product<ADD>(x, K, n, K, panel, width, width, y + j, y_row);
  }
}

// ---- attention

// J heads of one token: normalised where the model does so, times their gains, rotated.
void turn(float* x, int J, int C, const float* gain, const float* cos, const float* sin,
          bool has_norm, float eps) {
  const int half = C / 2;
  for (; J--; x += C, gain += C) {
    const float scale = has_norm ? inverse_rms(x, C, eps) : 1.0f;
    float *__restrict left = x, *__restrict right = x + half;
    for (int i = 0; i < half; i++) {
      float a = left[i] * scale * gain[i], b = right[i] * scale * gain[half + i];
      left[i] = a * cos[i] - b * sin[i];
      right[i] = b * cos[i] + a * sin[i];
    }
  }
}

// Softmax over p[from, to), 0 elsewhere in p[0, n); n is a multiple of W.
void softmax(float* p, int n, int from, int to) {
  std::fill(p, p + from, -INFINITY);
  std::fill(p + to, p + n, -INFINITY);
  vec most = load(p), total{};
  for (int i = W; i < n; i += W) most = load(p + i) > most ? load(p + i) : most;
  float top = most[0];
  for (int i = 1; i < W; i++) top = std::max(top, most[i]);
  for (int i = 0; i < n; i += W) {
    vec e = exp(load(p + i) - top);
    total += e;
    store(p + i, e);
  }
  const float scale = 1.0f / sum(total);
  for (int i = 0; i < n; i += W) store(p + i, load(p + i) * scale);
  std::fill(p, p + from, 0.0f);
  std::fill(p + to, p + n, 0.0f);
}

// What n queries of one head see, the i-th at place + i * step: k [C, S], v [S, C], p [n, S] free.
// Places before `first` are padding, which only padding sees: itself.
void attend(const float* q, long q_row, int n, int place, int step, int first, const float* k,
            const float* v, int C, long S, float* p, float* y, long y_row) {
  const int last = place + (n - 1) * step, from = std::min(first, place);
  const int begin = from / W * W, end = (last + W) / W * W;
  product(q, q_row, n, C, k + begin, S, end - begin, p, S);
  for (int i = 0; i < n; i++) {
    const int at = place + i * step;
    softmax(p + i * S, end - begin, std::min(first, at) - begin, at + 1 - begin);
  }
  product(p + from - begin, S, n, last + 1 - from, v + (long)from * C, C, C, y, y_row);
}

void store_values(const Model& m, const float* qkv, int T, int at, float* k, float* v) {
  const int C = m.C, G = m.G;
  const long row = (m.H + 2 * G) * C, S = m.S;
  for (int g = 0; g < G; g++, k += C * S, v += C * S) {
    const float *new_k = qkv + (m.H + g) * C, *new_v = new_k + G * C;
    for (int c = 0; c < C; c++)
      for (int t = 0; t < T; t++) k[c * S + at + t] = new_k[t * row + c];
    for (int t = 0; t < T; t++) std::copy_n(new_v + t * row, C, v + (long)(at + t) * C);
  }
}

// y [T, H C] for one row. A step's queries that share keys read them together; of many tokens some
// at a time do.
void attend_all(const Model& m, const float* qkv, int T, int at, int first, const float* k,
                const float* v, float* p, float* y) {
  const int C = m.C, R = m.H / m.G;
  const long row = (m.H + 2 * m.G) * C, y_row = m.H * C, S = m.S;
  for (int g = 0; g < m.G; g++, k += C * S, v += C * S, qkv += R * C, y += R * C) {
    if (T == 1) {
      attend(qkv, C, R, at, 0, first, k, v, C, S, p, y, C);
      continue;
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t += ROWS)
        attend(qkv + t * row + r * C, row, std::min(ROWS, T - t), at + t, 1, first, k, v, C, S, p,
               y + t * y_row + r * C, y_row);
  }
}

// ---- experts

// K of the scores [E] with the greatest score + bias, the lower of equal ones first, and their
// gates. NaN counts as the greatest, so that it is seen.
void route(const Model& m, const float* bias, const float* scores, int* chosen, float* gates) {
  float total = 0;
  for (int k = 0; k < m.K; k++) {
    int best = -1;
    float most = 0;
    for (int e = 0; e < m.E; e++) {
      const float choice = scores[e] + bias[e];
      if (best >= 0 && !(choice > most || std::isnan(choice))) continue;
      if (std::find(chosen, chosen + k, e) != chosen + k) continue;
      best = e, most = choice;
    }
    chosen[k] = best;
    total += gates[k] = scores[best];
  }
  const float scale = m.route_scale / (m.K > 1 ? total + 1e-20f : 1.0f);
  for (int k = 0; k < m.K; k++) gates[k] *= scale;
}

// y [n, D], or y += for ADD
template <bool ADD>
void mlp(const float* x, int n, int D, int F, const float* gate_up, const float* down, Scratch& s,
         float* y) {
  multiply(x, n, D, gate_up, 2 * F, 2 * F, s.gate_up.get(), 2 * F, s);
  swiglu(s.gate_up.get(), n, F, s.act.get());
  multiply<ADD>(s.act.get(), n, F, down, D, D, y, D, s);
}

// x [N, D] += experts of h
void experts(const Model& m, const Layer& l, int N, Scratch& s, float* x) {
  const int D = m.D, E_16 = padded(m.E), K = m.K;
  float* scores = s.scores.get();
  multiply(s.h.get(), N, D, l.router, E_16, E_16, scores, E_16, s);
  for (long i = 0; i < (long)N * E_16; i += W) store(scores + i, sigmoid(load(scores + i)));
  for (int i = 0; i < N; i++)
    route(m, l.bias, scores + (long)i * E_16, &s.chosen[i * K], &s.gates[i * K]);
  for (int e = 0; e < m.E; e++) {
    int n = 0;
    for (int j = 0; j < N * K; j++) {
      if (s.chosen[j] != e) continue;
      std::copy_n(&s.h[(long)(j / K) * D], D, &s.x[(long)n * D]);
      s.copies[n++] = j;
    }
    if (!n) continue;
    const long weights = (long)e * D * m.F;
    mlp<false>(s.x.get(), n, D, m.F, l.gate_up + 2 * weights, l.down + weights, s, s.y.get());
    for (int i = 0; i < n; i++) {
      const float gate = s.gates[s.copies[i]], *from = &s.y[(long)i * D];
      float* to = x + (long)(s.copies[i] / K) * D;
      for (int c = 0; c < D; c += W) store(to + c, load(to + c) + gate * load(from + c));
    }
  }
}

// ---- the network

// Leaves the padding out of x [B, T, D] from place `at` on: row b's tokens are then rows[b] to
// rows[b + 1] - 1 of x, up to place at + T - 1.
void leave_padding(float* x, int D, int B, int T, int at, const int32_t* first, int* rows) {
  rows[0] = 0;
  for (int b = 0; b < B; b++) {
    const int padding = first ? std::clamp(first[b] - at, 0, T) : 0;
    rows[b + 1] = rows[b] + T - padding;
    const float* from = x + ((long)b * T + padding) * D;
    std::copy(from, from + (long)(T - padding) * D, x + (long)rows[b] * D);
  }
}

// x [B, T, D] from place `at` on; k and v of the chunk's first row, which `layer` floats part from
// those of the next layer. Without logits [B T, V_16] the last layer only makes keys and values, and
// padding is left out.
void run(const Model& m, float* x, int B, int T, int at, const int32_t* first, float* k, float* v,
         long layer, Scratch& s, float* logits) {
  const int D = m.D, H = m.H, G = m.G, C = m.C, J = H + 2 * G;
  leave_padding(x, D, B, T, at, logits ? nullptr : first, s.rows.data());
  const int N = s.rows[B];
  const long row = (long)G * C * m.S;
  float *h = s.h.get(), *qkv = s.qkv.get();
  for (int i = 0; i < m.n_layers; i++, k += layer, v += layer) {
    const Layer& l = m.layers[i];
    const bool is_end = !logits && i + 1 == m.n_layers;
    const int skip = is_end ? H : 0;  // heads that nobody needs
    rms_norm(x, N, D, l.attention_gain, m.eps, h);
    multiply(h, N, D, l.qkv + skip * C, J * C, (J - skip) * C, qkv + skip * C, J * C, s);
    for (int b = 0; b < B; b++) {
      const int begin = s.rows[b], n = s.rows[b + 1] - begin, place = at + T - n;
      float *new_b = qkv + (long)begin * J * C, *k_b = k + b * row, *v_b = v + b * row;
      for (int t = 0; t < n; t++) {
        const long angles = (long)(place + t) * (C / 2);
        turn(new_b + (long)(t * J + skip) * C, H + G - skip, C, l.head_gain + skip * C,
             m.cos + angles, m.sin + angles, m.has_norm, m.eps);
      }
      store_values(m, new_b, n, place, k_b, v_b);
      if (!is_end)
        attend_all(m, new_b, n, place, first ? first[b] : 0, k_b, v_b, s.weights.get(),
                   &s.y[(long)begin * H * C]);
    }
    if (is_end) return;
    multiply<true>(s.y.get(), N, H * C, l.out, D, D, x, D, s);
    rms_norm(x, N, D, l.mlp_gain, m.eps, h);
    if (l.router) experts(m, l, N, s, x);
    else mlp<true>(h, N, D, m.F, l.gate_up, l.down, s, x);
    if (m.d_shared) mlp<true>(h, N, D, m.d_shared, l.shared_gate_up, l.shared_down, s, x);
  }
  rms_norm(x, N, D, m.gain, m.eps, h);
  multiply(h, N, D, m.head, m.V_16, m.V_16, logits, m.V_16, s);
}

}  // namespace

// x [n, T, D]: the embedded tokens, which are overwritten. k [layers, n, G, C, S] and
// v [layers, n, G, S, C] hold `at` places already. first [n], or null: where a row's padding ends.
extern "C" Error decode(int threads, const Model* m, float* x, int n, int T, int at,
                        const int32_t* first, float* k, float* v, float* logits) try {
  const int most = std::max(1, CHUNK / T);  // rows of a chunk
  const int rounds = (n + threads * most - 1) / (threads * most);
  const int rows = (n + threads * rounds - 1) / (threads * rounds);
  const int tokens = std::min(T, CHUNK);  // a long row takes its tokens in pieces
  const long row = (long)m->G * m->C * m->S;
  in_parallel((n + rows - 1) / rows, threads, [&](int chunk) {
    const int b = chunk * rows, B = std::min(rows, n - b);
    Scratch scratch(*m, B, (long)B * tokens);
    for (int t = 0; t < T; t += tokens) {
      const long token = (long)b * T + t;
      run(*m, x + token * m->D, B, std::min(tokens, T - t), at + t, first ? first + b : nullptr,
          k + b * row, v + b * row, n * row, scratch,
          logits ? logits + token * m->V_16 : nullptr);
    }
  });
  return nullptr;
} catch (...) {
  return reason();
}
