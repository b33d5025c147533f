// Generation: T new tokens for each of n rows with cached keys and values, through all layers.
//
// A chunk of rows passes through all layers on one thread: its activations stay in that core's
// cache, and no thread waits for another. A row's results don't depend on the other rows.
//
// Shape legend: B rows of a chunk, T new tokens of each, N = B T, D d_model, H query heads,
// G key/value heads, J = H + 2 G, C head_dim, S places of a row (a multiple of 16), E experts,
// K of them chosen per token, F d_expert, V vocabulary; *_16 rounded up to a multiple of 16.
#include <vector>

#include "kernels.h"

namespace {

constexpr int CHUNK = 256;       // tokens: they fit in the cache, and are many per read of a weight
constexpr int PANEL = 32;        // columns of a weight
constexpr long LARGE = 1 << 17;  // elements of a weight that doesn't fit in a core's cache

struct Layer {  // laid out as in kernel_steps.py, as is Model
  const float* attention_gain;  // [D]
  const float* qkv;             // [D, J C]
  const float* head_gain;       // [H + G, C]; includes attention's 1 / sqrt(C) for queries
  const float* out;             // [H C, D]
  const float* mlp_gain;        // [D]
  const float* gate_up;         // [E, D, 2 F]
  const float* down;            // [E, F, D]
  const float* router;          // [D, E_16]; null in a dense model
  const float* bias;            // [E]
  const float* shared_gate_up;  // [D, 2 d_shared]
  const float* shared_down;     // [d_shared, D]
};

struct Model {
  int32_t n_layers, D, H, G, C, E, K, F, d_shared, has_norm, V_16, S;
  float eps, route_scale;
  const Layer* layers;
  const float *gain, *head;  // [D], [D, V_16]
  const float *cos, *sin;    // [S, C]
};

struct Scratch {
  const Model& m;
  const int B;
  const long N;
  const long wide = std::max(m.F, m.d_shared);
  Floats h = floats(N * m.D);
  Floats qkv = floats(N * (m.H + 2 * m.G) * m.C);
  Floats y = floats(N * std::max(m.H * m.C, m.D));
  Floats weights = floats((long)std::max(ROWS, m.H / m.G) * m.S);
  Floats scores = floats(N * padded(m.E));
  Floats gates = floats(N * m.K);
  Floats x = floats(N * m.D);
  Floats gate_up = floats(N * 2 * wide);
  Floats act = floats(N * wide);
  Floats panel = floats(PANEL * std::max<long>({m.D, m.H * m.C, wide}));
  std::vector<int> chosen = std::vector<int>(N * m.K);
  std::vector<int> copies = std::vector<int>(N);
  std::vector<int> rows = std::vector<int>(B + 1);
};

// y [n, N] = x [n, K] w [K, N], or y += for ADD. With many rows, each panel of a large w is copied
// to one place before it is read again and again: cache lines far apart would evict each other.
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

// Attention of n queries of one head, the i-th at place + i * step; k [C, S], v [S, C], p [n, S]
// scratch. Places before `first` are padding, which sees only itself.
void attend(const float* q, long q_row, int n, int place, int step, int first, const float* k,
            const float* v, int C, long S, float* p, float* y, long y_row) {
  const int last = place + (n - 1) * step, from = std::min(first, place);
  const int begin = from / W * W, end = (last + W) / W * W;
  product(q, q_row, n, C, k + begin, S, end - begin, p, S);
  for (int i = 0; i < n; i++) {
    const int at = place + i * step;
    softmax(p + i * S, std::min(first, at) - begin, at + 1 - begin, end - begin);
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

// y [T, H C] for one row. In a step of one token, the queries that share keys read them together;
// in a prompt, some tokens of one head do.
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

// The K experts with the greatest score + bias (the lower index among equals) and their gates. NaN
// counts as the greatest, so that it shows up in the result.
void route(const Model& m, const float* bias, const float* scores, int* chosen, float* gates) {
  float total = 0;
  for (int k = 0; k < m.K; k++) {
    int best = -1;
    float most = 0;
    for (int e = 0; e < m.E; e++) {
      const float choice = scores[e] + bias[e];
      const bool is_better = best < 0 || choice > most || std::isnan(choice);
      if (is_better && std::find(chosen, chosen + k, e) == chosen + k) best = e, most = choice;
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

// x [N, D] += the experts of h
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

// Drops the padding from x [B, T, D], which begins at place `at`: row b's tokens are then rows[b]
// to rows[b + 1] - 1 of x and end at place at + T - 1.
void drop_padding(float* x, int D, int B, int T, int at, const int32_t* first, int* rows) {
  rows[0] = 0;
  for (int b = 0; b < B; b++) {
    const int padding = first ? std::clamp(first[b] - at, 0, T) : 0;
    rows[b + 1] = rows[b] + T - padding;
    const float* from = x + ((long)b * T + padding) * D;
    std::copy(from, from + (long)(T - padding) * D, x + (long)rows[b] * D);
  }
}

// x [B, T, D] begins at place `at`; k and v are those of the chunk's first row, `layer` floats
// before the next layer's. Without logits [B T, V_16] the last layer only computes keys and values,
// and padding is dropped.
void run(const Model& m, float* x, int B, int T, int at, const int32_t* first, float* k, float* v,
         long layer, Scratch& s, float* logits) {
  const int D = m.D, H = m.H, G = m.G, C = m.C, J = H + 2 * G;
  drop_padding(x, D, B, T, at, logits ? nullptr : first, s.rows.data());
  const int N = s.rows[B];
  const long row = (long)G * C * m.S;
  float *h = s.h.get(), *qkv = s.qkv.get();
  for (int i = 0; i < m.n_layers; i++, k += layer, v += layer) {
    const Layer& l = m.layers[i];
    const bool is_end = !logits && i + 1 == m.n_layers;
    const int skip = is_end ? H : 0;  // heads: no queries are needed
    rms_norm(x, N, D, l.attention_gain, m.eps, h);
    multiply(h, N, D, l.qkv + skip * C, J * C, (J - skip) * C, qkv + skip * C, J * C, s);
    for (int b = 0; b < B; b++) {
      const int begin = s.rows[b], n = s.rows[b + 1] - begin, place = at + T - n;
      float *new_b = qkv + (long)begin * J * C, *k_b = k + b * row, *v_b = v + b * row;
      for (int t = 0; t < n; t++) {
        const long angles = (long)(place + t) * C;
        for (int j = skip; j < H + G; j++) {
          float* head = new_b + (long)(t * J + j) * C;
          const float scale = m.has_norm ? inverse_rms(head, C, m.eps) : 1.0f;
          rotate(head, scale, l.head_gain + j * C, m.cos + angles, m.sin + angles, C, head);
        }
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

// x [n, T, D]: the embedded tokens, overwritten. k [layers, n, G, C, S] and v [layers, n, G, S, C]
// already hold `at` places. first [n], or null: where each row's padding ends.
extern "C" Error decode(int threads, const Model* m, float* x, int n, int T, int at,
                        const int32_t* first, float* k, float* v, float* logits) {
  return guarded([&] {
    const int most = std::max(1, CHUNK / T);  // rows of a chunk
    const int rounds = (n + threads * most - 1) / (threads * most);
    const int rows = (n + threads * rounds - 1) / (threads * rounds);
    const int tokens = std::min(T, CHUNK);  // a long row takes its tokens in pieces
    const long row = (long)m->G * m->C * m->S;
    in_parallel((n + rows - 1) / rows, threads, [&](int chunk) {
      const int b = chunk * rows, B = std::min(rows, n - b);
      Scratch scratch{*m, B, (long)B * tokens};
      for (int t = 0; t < T; t += tokens) {
        const long token = (long)b * T + t;
        run(*m, x + token * m->D, B, std::min(tokens, T - t), at + t, first ? first + b : nullptr,
            k + b * row, v + b * row, n * row, scratch,
            logits ? logits + token * m->V_16 : nullptr);
      }
    });
  });
}
