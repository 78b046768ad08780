// Splits text into words, counts and sorts them through libc: `qsort` with a
// callback, `strcmp`, `memcpy`, `malloc`.
#include "bench.h"
static char text[60000];
static int by_text(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }
uint32_t kernel(int scale) {
    for (int i = 0; i < (int)sizeof text - 1; i++) text[i] = next_random() % 6 ? 'a' + next_random() % 7 : ' ';
    uint32_t sum = 0;
    for (int n = 0; n < scale; n++) {
        char **words = malloc(20000 * sizeof *words);
        int count = 0;
        for (const char *p = text; *p;) {
            while (*p == ' ') p++;
            const char *end = p;
            while (*end && *end != ' ') end++;
            if (end == p) break;
            char *word = malloc(end - p + 1);
            memcpy(word, p, end - p);
            word[end - p] = 0;
            words[count++] = word;
            p = end;
        }
        qsort(words, count, sizeof *words, by_text);
        for (int i = 1; i < count; i++) sum += strcmp(words[i - 1], words[i]) != 0;
        for (int i = 0; i < count; i++) free(words[i]);
        free(words);
        text[n % 50000] = 'a' + n % 7;
    }
    return sum;
}
