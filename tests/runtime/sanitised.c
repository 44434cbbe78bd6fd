// Runs launch tables under ThreadSanitizer: ./sanitised FILE RUNS
//
// FILE holds launches in 64-bit words: the number of arrays, then of each its length, its words, the
// number of words in it that are addresses, and for each of these its position, the array that it
// points to and the offset there in bytes (array -1: function `offset` of `functions`). Array 0 is
// the launch block, 1 the pointers of a call, 2 what array 3 has to be afterwards.
// Exit status: 1 for a wrong result, 66 for a data race, others for files that are none.
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 8 };

void plait_thread_body(void *launch);
void plait_launch_body(void *launch, void *pointers);
void plait_thread(void *launch) { plait_thread_body(launch); }

static _Thread_local int number, team = 1;

struct worker {
  void (*body)(void *);
  void *data;
  int number, team;
};

static void *work(void *given) {
  struct worker *w = given;
  number = w->number, team = w->team;
  w->body(w->data);
  return 0;
}

// Threads of their own for each launch: what GOMP's do between launches the sanitiser cannot see.
static void parallel(void (*body)(void *), void *data, unsigned count, unsigned flags) {
  (void)flags;
  pthread_t threads[64];
  struct worker workers[64];
  for (unsigned k = 0; k < count; k++) {
    workers[k] = (struct worker){body, data, k, count};
    if (pthread_create(&threads[k], 0, work, &workers[k])) exit(2);
  }
  for (unsigned k = 0; k < count; k++) pthread_join(threads[k], 0);
}

static int thread_num(void) { return number; }
static int num_threads(void) { return team; }

// Each row of the result needs other rows of both operands.
static void mix(int64_t lo, int64_t hi, const int64_t *a, const int64_t *b, int64_t *out) {
  for (int64_t r = lo; r < hi; r++) out[r] = 3 * a[(r + 1) % ROWS] + b[(5 * r) % ROWS] + r;
}

static void *functions[] = {mix, parallel, thread_num, num_threads, sched_yield};

static int64_t word(FILE *file) {
  int64_t value;
  if (fread(&value, 8, 1, file) != 1) exit(3);
  return value;
}

int main(int argc, char **argv) {
  FILE *file = argc == 3 ? fopen(argv[1], "rb") : 0;
  if (!file) return 3;
  for (int c; (c = getc(file)) != EOF;) {
    ungetc(c, file);
    int64_t count = word(file);
    int64_t **arrays = calloc(count, sizeof *arrays), *lengths = calloc(count, 8);
    int64_t(*moves)[4] = calloc(1 << 16, sizeof *moves), n = 0;
    for (int64_t k = 0; k < count; k++) {
      lengths[k] = word(file);
      arrays[k] = aligned_alloc(64, (8 * lengths[k] + 64) / 64 * 64);
      for (int64_t i = 0; i < lengths[k]; i++) arrays[k][i] = word(file);
      for (int64_t left = word(file); left > 0; left--, n++) {
        moves[n][0] = k;
        for (int i = 1; i < 4; i++) moves[n][i] = word(file);
      }
    }
    for (int64_t i = 0; i < n; i++) {
      int64_t to = moves[i][2], offset = moves[i][3];
      arrays[moves[i][0]][moves[i][1]] =
          to < 0 ? (int64_t)functions[offset] : (int64_t)arrays[to] + offset;
    }
    for (int run = atoi(argv[2]); run > 0; run--) {
      for (int r = 0; r < ROWS; r++) arrays[3][r] = -1;
      plait_launch_body(arrays[0], arrays[1]);
      for (int r = 0; r < ROWS; r++)
        if (arrays[3][r] != arrays[2][r]) {
          printf("row %d is %ld, not %ld\n", r, (long)arrays[3][r], (long)arrays[2][r]);
          return 1;
        }
    }
    free(arrays), free(lengths), free(moves);  // the arrays stay: addresses are not used twice
  }
  return 0;
}
