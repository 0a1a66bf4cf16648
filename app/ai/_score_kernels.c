/* The loops of scoring, over the flat arrays that feature_plan.py, feature_safety.py, score_kernels.py,
 * calibration.py and prediction_cache.py lay out: features are built, made safe, scored and calibrated, and
 * answers are remembered.
 *
 * Plain C99 without Python's headers: a shared library that ctypes opens, so that other threads run during most
 * calls; score_kernels.py says which keep the interpreter's lock. The caller has checked every index and every
 * shape; nothing here looks again.
 *
 * Every row adds its terms in one order, whatever rows stand beside it, and in scikit-learn's order: compiled
 * without contraction into fused operations (-ffp-contract=off) the sums are equal to the last bit. */

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 16,       /* walks that go on side by side: their steps do not wait for each other */
    BLOCK_ROWS = 512, /* rows that stay in the cache while all trees pass over them */
    TEXT_BYTES = 56,  /* room for a known text and the NUL that ends it */
    WAYS = 16,        /* answers that one set has room for */
    BLOCK_TEXTS = 32  /* texts that are hashed before the first of them is looked up */
};

/* A value up to the threshold goes to child[0], a greater one to child[1], a NaN to child[nan_child].
 * A leaf holds its value in `threshold` and is its own child, so a walk of fixed length may go on there. */
struct node {
    double threshold;
    int32_t child[2];
    int32_t feature;
    int32_t nan_child;
};

/* What is usable of a column of numbers. */
struct cell_column {
    double lower, upper;
    int64_t is_flag;
};

enum operation { VALUE, LOG1P, IS_PRESENT, AGE_DAYS, DAYS_UNTIL, DAYS_BETWEEN, RATIO, LOOK_UP };

/* `first` and `second` are rows of numbers; for LOG1P the second is a row of logarithms; for LOOK_UP the first
 * is a row of codes and the second where in `levels` its table begins. */
struct feature {
    double zero_over_zero;
    int32_t operation, first, second;
};

struct level {
    double value;
    int64_t state;
};

/* A text that a column has been seen to hold, and its code; `size` is that of the text and its NUL, 0 where no
 * text is. */
struct known_text {
    char text[TEXT_BYTES];
    int32_t size, code;
};

enum state { PRESENT, MISSING, INVALID, UNSEEN };

/* What becomes of a value outside its range, and of a gap in each of the states. */
struct rule {
    double lower, upper, far_below, far_above, clip_below, clip_above, impute, fill[4];
    int64_t units;
    bool reject_gap[4], impute_outside, reject_outside, indicator, speaks;
};

/* What is said of a lead whose features were made safe. */
struct checked {
    double coverage, weighted_coverage;
    int64_t out_of_range;
    bool rejected;
};

struct answer {
    double raw_score, probability, confidence, coverage;
    bool prediction;
    uint8_t verdict;
};

/* One answer in the ring: half of its key's hash, until when it holds, the moment its read began, and which
 * changes are its lead's. */
struct entry {
    uint64_t check;
    double expires;
    int64_t since, mark;
    struct answer answer;
};

/* The answers whose keys' hashes belong here, by the other half of them. Answers are numbered from 1 on; the
 * place of one is its number modulo the size of the ring. */
struct set {
    uint64_t hashes[WAYS];
    int64_t numbers[WAYS];
};

/* `changed` has the moment of the last change, by mark. */
struct table {
    struct set *sets;
    struct entry *ring;
    const int64_t *changed;
    int64_t n_sets, size;
};

const int32_t record_bytes[] = {sizeof(struct node),  sizeof(struct cell_column), sizeof(struct feature),
                                sizeof(struct level), sizeof(struct rule),        sizeof(struct checked),
                                sizeof(struct entry), sizeof(struct set),         sizeof(struct known_text),
                                sizeof(struct table)};

/* Of this file, from setup.py. */
const char source_sha256[] = SOURCE_SHA256;

static inline double round_to_single(double value) {
    /* A huge value stays a value instead of becoming an infinity. */
    if (value > FLT_MAX) return FLT_MAX;
    if (value < -FLT_MAX) return -FLT_MAX;
    return (float)value;
}

/* Copies rows so that neighbouring features stand `feature_step` apart and neighbouring rows `row_step`. */
static void copy_rows(const double *rows, int64_t n_rows, int64_t n_features, int32_t single, double *copy,
                      int64_t feature_step, int64_t row_step) {
    for (int64_t row = 0; row < n_rows; row++) {
        for (int64_t feature = 0; feature < n_features; feature++) {
            double value = rows[row * n_features + feature];
            copy[feature * feature_step + row * row_step] = single ? round_to_single(value) : value;
        }
    }
}

/* Walks `depth` steps from LANES nodes side by side; `at` says where each begins, and then where it is. */
static inline void walk(const struct node *nodes, int32_t *at, int32_t depth, const double *values,
                        int64_t feature_step, int64_t lane_step) {
    for (int32_t level = 0; level < depth; level++) {
        for (int64_t lane = 0; lane < LANES; lane++) {
            const struct node *node = nodes + at[lane];
            double value = values[node->feature * feature_step + lane * lane_step];
            /* No branch: which way a row goes is as good as random. */
            at[lane] = node->child[(value > node->threshold) | ((value != value) & node->nan_child)];
        }
    }
}

/* Adds one tree's leaves to the sums of the LANES rows of a panel. */
static void add_tree(const struct node *nodes, int32_t root, int32_t depth, const double *panel,
                     double *sums) {
    int32_t at[LANES];
    for (int lane = 0; lane < LANES; lane++) at[lane] = root;
    walk(nodes, at, depth, panel, LANES, 1);
    for (int lane = 0; lane < LANES; lane++) sums[lane] += nodes[at[lane]].threshold;
}

/* Returns `sum` and all trees' leaves of one row, added in the order of the trees, LANES of which are walked
 * side by side: a single row would otherwise wait for memory at every step. */
static double add_trees(const struct node *nodes, const int32_t *roots, const int32_t *depths,
                        int64_t n_trees, const double *row, double sum) {
    for (int64_t first = 0; first < n_trees; first += LANES) {
        int32_t at[LANES], depth = 0;
        for (int64_t lane = 0; lane < LANES; lane++) {
            int64_t tree = first + lane < n_trees ? first + lane : first;
            at[lane] = roots[tree];
            if (depths[tree] > depth) depth = depths[tree];
        }
        walk(nodes, at, depth, row, 1, 0);
        int64_t count = n_trees - first < LANES ? n_trees - first : LANES;
        for (int64_t lane = 0; lane < count; lane++) sum += nodes[at[lane]].threshold;
    }
    return sum;
}

/* Adds to sums (n_rows) the leaves that rows (n_rows, n_features) reach, in the order of the trees, whose
 * deepest leaves are `depths` steps from their roots. With `single` values are rounded to single precision
 * first. Returns -1 without memory, else 0. */
int32_t sum_trees(const struct node *nodes, const int32_t *roots, const int32_t *depths, int64_t n_trees,
                  const double *rows, int64_t n_rows, int64_t n_features, int32_t single, double *sums) {
    int64_t most_rows = n_rows < BLOCK_ROWS ? n_rows : BLOCK_ROWS;
    double *copy = malloc((size_t)(most_rows * n_features) * sizeof(double) + 1);
    if (copy == NULL) return -1;
    int64_t done = 0;
    while (n_rows - done >= LANES) {
        int64_t block_rows = n_rows - done < BLOCK_ROWS ? (n_rows - done) / LANES * LANES : BLOCK_ROWS;
        for (int64_t row = 0; row < block_rows; row += LANES) {
            copy_rows(rows + (done + row) * n_features, LANES, n_features, single, copy + row * n_features,
                      LANES, 1);
        }
        for (int64_t tree = 0; tree < n_trees; tree++) {
            for (int64_t row = 0; row < block_rows; row += LANES) {
                add_tree(nodes, roots[tree], depths[tree], copy + row * n_features, sums + done + row);
            }
        }
        done += block_rows;
    }
    for (; done < n_rows; done++) {
        copy_rows(rows + done * n_features, 1, n_features, single, copy, 1, 0);
        sums[done] = add_trees(nodes, roots, depths, n_trees, copy, sums[done]);
    }
    free(copy);
    return 0;
}

/* Adds to sums (n_rows) the weighted features of rows (n_rows, n_features), feature by feature, after
 * n_scalings times taking a mean away and dividing by a scale, both (n_scalings, n_features). */
void sum_terms(const double *means, const double *scales, int64_t n_scalings, const double *weights,
               const double *rows, int64_t n_rows, int64_t n_features, double *sums) {
    for (int64_t row = 0; row < n_rows; row++) {
        double total = sums[row];
        for (int64_t feature = 0; feature < n_features; feature++) {
            double value = rows[row * n_features + feature];
            for (int64_t i = feature; i < n_scalings * n_features; i += n_features) {
                value = (value - means[i]) / scales[i];
            }
            total += value * weights[feature];
        }
        sums[row] = total;
    }
}

/* Turns log-odds into probabilities, as SciPy's expit does. */
void logistic(double *values, int64_t n) {
    for (int64_t i = 0; i < n; i++) values[i] = 1 / (1 + exp(-values[i]));
}

/* Finds the codes (n_columns, n_leads) of texts that each end with a NUL, column after column, among the
 * `n_known` that are known of each column, or -1; returns how many are not known. */
int64_t code_texts(const struct known_text *known, int64_t n_known, const char *texts, int64_t n_columns,
                   int64_t n_leads, int32_t *codes) {
    int64_t unknown = n_columns * n_leads;
    for (int64_t column = 0; column < n_columns; column++, known += n_known) {
        for (int64_t lead = 0; lead < n_leads; lead++) {
            size_t size = strlen(texts) + 1;
            int32_t code = -1;
            for (int64_t at = 0; at < n_known && known[at].size; at++) {
                if ((size_t)known[at].size == size && memcmp(known[at].text, texts, size) == 0) {
                    code = known[at].code;
                    unknown--;
                    break;
                }
            }
            *codes++ = code;
            texts += size;
        }
    }
    return unknown;
}

/* Returns a number if it is usable, else NaN; `state` says which. */
static inline double read_cell(const struct cell_column *column, double number, uint8_t *state) {
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    bool usable = number >= column->lower && number <= column->upper;
    if (column->is_flag) usable = usable && (number == 0 || number == 1);
    *state = bits == 0x7FF8000000000001 ? MISSING : usable ? PRESENT : INVALID;
    return usable ? number : NAN;
}

/* Builds values and states (n_leads, n_features) from numbers, their logarithms and codes of texts, one row for
 * each column of `n_leads`. The as-of times stand `moment_step` apart, 0 or 1. */
void build_features(const struct cell_column *columns, const struct feature *features,
                    const struct level *levels, const double *numbers, const double *logs,
                    const int32_t *codes, const double *moments, int64_t n_features, int64_t moment_step,
                    int64_t n_leads, double *values, uint8_t *states) {
    const double day = 86400;
    for (int64_t lead = 0; lead < n_leads; lead++) {
        double moment = moments[lead * moment_step];
        for (int64_t at = 0; at < n_features; at++) {
            const struct feature *feature = features + at;
            double first = 0, second = 0, value = NAN;
            uint8_t state, other = PRESENT;
            if (feature->operation == LOOK_UP) {
                const struct level *level = levels + feature->second + codes[feature->first * n_leads + lead];
                value = level->value;
                state = (uint8_t)level->state;
            } else {
                first = read_cell(columns + feature->first, numbers[feature->first * n_leads + lead], &state);
            }
            if (feature->operation == DAYS_BETWEEN || feature->operation == RATIO) {
                second = read_cell(columns + feature->second, numbers[feature->second * n_leads + lead], &other);
                if (other > state) state = other;
            }
            switch (feature->operation) {
                case VALUE: value = first; break;
                case LOG1P: if (first >= 0) value = logs[feature->second * n_leads + lead]; break;
                case IS_PRESENT: value = state == PRESENT; state = PRESENT; break;
                case AGE_DAYS: value = (moment - first) / day; if (value < 0) value = 0; break;
                case DAYS_UNTIL: value = (first - moment) / day; break;
                case DAYS_BETWEEN: value = (second - first) / day; break;
                case RATIO: value = first == 0 && second == 0 ? feature->zero_over_zero : first / second; break;
            }
            if (!(fabs(value) <= FLT_MAX)) {
                value = NAN;
                if (state == PRESENT) state = INVALID;
            }
            values[lead * n_features + at] = value + 0.0; /* -0.0 becomes 0.0 */
            states[lead * n_features + at] = state;
        }
    }
}

/* Makes values (n_leads, n_features) in their states safe by a rule for each feature, and says of each lead
 * what share of it is there: of `n_groups` and, weighted, of `units_in_all`. */
void check_features(const struct rule *rules, int64_t n_features, int64_t n_groups, int64_t units_in_all,
                    const double *values, const uint8_t *states, int64_t n_leads, double *safe,
                    struct checked *checked) {
    for (int64_t lead = 0; lead < n_leads; lead++) {
        int64_t groups = 0, units = 0, far_values = 0;
        bool rejected = false;
        for (int64_t at = 0; at < n_features; at++) {
            const struct rule *rule = rules + at;
            double value = values[lead * n_features + at], made = value;
            uint8_t state = states[lead * n_features + at] & 3;
            bool gap = value != value, unseen = state == UNSEEN;
            bool outside = value < rule->lower || value > rule->upper;
            bool far = !unseen && (value < rule->far_below || value > rule->far_above);
            bool there = (state == PRESENT && !(rule->indicator && value == 0)) || (unseen && !gap);
            if (made < rule->clip_below) made = rule->clip_below;
            if (made > rule->clip_above) made = rule->clip_above;
            if (outside && rule->impute_outside) made = rule->impute;
            if (gap) made = rule->fill[state];
            rejected |= gap ? rule->reject_gap[state] : outside && rule->reject_outside;
            groups += there && rule->speaks;
            if (there && !far && !unseen) units += rule->units;
            far_values += far;
            safe[lead * n_features + at] = made + 0.0;
        }
        checked[lead].coverage = (double)groups / (double)n_groups;
        checked[lead].weighted_coverage = (double)units / (double)units_in_all;
        checked[lead].out_of_range = far_values;
        checked[lead].rejected = rejected;
    }
}

static inline double between(double value, double lower, double upper) {
    value = value > lower ? value : lower; /* a NaN is below everything */
    return value < upper ? value : upper;
}

/* Returns how many of ascending numbers are no greater than `value`. */
static inline int64_t count_up_to(const double *numbers, int64_t n, double value) {
    int64_t first = 0;
    while (n > 0) {
        int64_t half = n / 2;
        if (numbers[first + half] <= value) {
            first += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return first;
}

/* Reads the probabilities of raw scores off a curve through `n_points` (x, y), `widths` apart, as calibration.py
 * does: the odds against are multiplied by `shift`, unless it is 0, and a share of `tie_break` is the score. */
void calibrate_by_curve(const double *x, const double *y, const double *widths, int64_t n_points,
                        const double *raw, int64_t n, double lower, double upper, double shift,
                        double tie_break, double *probability) {
    for (int64_t i = 0; i < n; i++) {
        double score = between(between(raw[i], -1e150, 1e150), x[0], x[n_points - 1]);
        int64_t right = count_up_to(x, n_points, score);
        if (right > n_points - 1) right = n_points - 1;
        int64_t left = right > 0 ? right - 1 : 0;
        double p = y[left] + (score - x[left]) / widths[left] * (y[right] - y[left]);
        if (p > y[right]) p = y[right];
        if (shift != 0) {
            p = between(p, 0, 1);
            p = 1 / (1 + (1 - p) / p * shift);
        }
        p = between(p, lower, upper) + 0.0;
        if (tie_break != 0) {
            double target = lower + between(raw[i], 0, 1) * (upper - lower);
            p = between((1 - tie_break) * p + tie_break * target, lower, upper) + 0.0;
        }
        probability[i] = p;
    }
}

static inline uint64_t rotate(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

static inline void mix(uint64_t *v, int rounds) {
    for (int round = 0; round < rounds; round++) {
        v[0] += v[1];
        v[1] = rotate(v[1], 13) ^ v[0];
        v[0] = rotate(v[0], 32);
        v[2] += v[3];
        v[3] = rotate(v[3], 16) ^ v[2];
        v[0] += v[3];
        v[3] = rotate(v[3], 21) ^ v[0];
        v[2] += v[1];
        v[1] = rotate(v[1], 17) ^ v[2];
        v[2] = rotate(v[2], 32);
    }
}

static inline void absorb(uint64_t *v, uint64_t word) {
    v[3] ^= word;
    mix(v, 2);
    v[0] ^= word;
}

static inline uint64_t squeeze(uint64_t *v) {
    mix(v, 4);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* The 128-bit hash of a text under a secret key: SipHash-2-4-128 (Aumasson and Bernstein, SipHash: a fast
 * short-input PRF, INDOCRYPT 2012, and its reference implementation), on a little-endian processor. */
void hash_text(const char *text, int64_t n, const uint64_t *key, uint64_t *hash) {
    uint64_t v[4] = {key[0] ^ 0x736f6d6570736575, key[1] ^ 0x646f72616e646f6d ^ 0xee,
                     key[0] ^ 0x6c7967656e657261, key[1] ^ 0x7465646279746573};
    uint64_t word, last = (uint64_t)n << 56;
    for (; n >= 8; n -= 8, text += 8) {
        memcpy(&word, text, sizeof word);
        absorb(v, word);
    }
    while (n--) last |= (uint64_t)(uint8_t)text[n] << 8 * n;
    absorb(v, last);
    v[2] ^= 0xee;
    hash[0] = squeeze(v);
    v[1] ^= 0xdd;
    hash[1] = squeeze(v);
}

/* Hashes the next BLOCK_TEXTS of `n` texts, each of which ends with a NUL, and has their sets fetched; returns
 * where the texts after them begin. */
static const char *hash_block(const struct table *table, const char *texts, int64_t n, const uint64_t *key,
                              uint64_t (*hashes)[2]) {
    for (int64_t i = 0; i < n && i < BLOCK_TEXTS; i++) {
        size_t length = strlen(texts);
        hash_text(texts, (int64_t)length, key, hashes[i]);
        const struct set *set = table->sets + hashes[i][0] % (uint64_t)table->n_sets;
        __builtin_prefetch(set->hashes);
        __builtin_prefetch(set->hashes + WAYS / 2);
        texts += length + 1;
    }
    return texts;
}

/* Looks up `n` texts, each of which ends with a NUL, under a key: `found` tells whether one's answer is
 * known, not yet expired at `now`, and read after the last change of its lead and of all leads. `answers` and
 * `expires` are of those found, the others' are arbitrary. */
void find_answers(const struct table *table, const char *texts, int64_t n, const uint64_t *key, double now,
                  int64_t all_changed, bool *found, struct answer *answers, double *expires) {
    uint64_t hashes[BLOCK_TEXTS][2];
    for (int64_t i = 0; i < n; i++) {
        if (i % BLOCK_TEXTS == 0) texts = hash_block(table, texts, n - i, key, hashes);
        const uint64_t *hash = hashes[i % BLOCK_TEXTS];
        const struct set *set = table->sets + hash[0] % (uint64_t)table->n_sets;
        int64_t number = 0;
        for (int way = 0; way < WAYS; way++) {
            if (set->hashes[way] == hash[0]) number = set->numbers[way];
        }
        const struct entry *entry = table->ring + number % table->size;
        int64_t changed = table->changed[entry->mark];
        found[i] = number > 0 && entry->check == hash[1] && entry->expires > now && entry->since >= changed &&
                   entry->since >= all_changed;
        answers[i] = entry->answer;
        expires[i] = entry->expires;
    }
}

/* Enters `n` answers, numbered from `number` on, under texts that each end with a NUL, and returns how many. In
 * its set each takes the place of the one it renews, or else of the oldest; one that expires later, so was read
 * later, is not renewed. */
int64_t remember_answers(const struct table *table, const char *texts, int64_t n, const uint64_t *key,
                         int64_t number, double expires, int64_t since, const int64_t *marks,
                         const struct answer *answers) {
    uint64_t hashes[BLOCK_TEXTS][2];
    int64_t entered = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i % BLOCK_TEXTS == 0) texts = hash_block(table, texts, n - i, key, hashes);
        const uint64_t *hash = hashes[i % BLOCK_TEXTS];
        struct set *set = table->sets + hash[0] % (uint64_t)table->n_sets;
        int oldest = 0;
        for (int way = 0; way < WAYS; way++) {
            if (set->numbers[way] < set->numbers[oldest]) oldest = way;
            if (set->hashes[way] == hash[0]) {
                oldest = way;
                break;
            }
        }
        const struct entry *known = table->ring + set->numbers[oldest] % table->size;
        if (set->hashes[oldest] == hash[0] && known->check == hash[1] && known->expires > expires) continue;
        set->hashes[oldest] = hash[0];
        set->numbers[oldest] = number + entered;
        table->ring[(number + entered) % table->size] =
            (struct entry){hash[1], expires, since, marks[i], answers[i]};
        entered++;
    }
    return entered;
}
