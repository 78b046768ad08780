// Is nearly always inside a blocked host call.
#define BENCH_NO_MAIN
#include "bench.h"
int main(void) { for (;;) usleep(1000000); }
