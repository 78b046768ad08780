// A register machine in a `switch`: what language runtimes spend their time in.
#include "bench.h"
typedef struct { uint8_t op, a, b, c; } Code;
enum { ADD, SUB, MUL, XOR, LOAD, STORE, SHIFT, LESS, JUMP_IF, CONST, HALT };
static uint32_t memory[1024];
static NOINLINE uint32_t run(const Code *code, uint32_t rounds) {
    uint32_t r[8] = {0};
    r[7] = rounds;
    for (const Code *pc = code;; pc++) {
        switch (pc->op) {
        case ADD: r[pc->a] = r[pc->b] + r[pc->c]; break;
        case SUB: r[pc->a] = r[pc->b] - r[pc->c]; break;
        case MUL: r[pc->a] = r[pc->b] * r[pc->c]; break;
        case XOR: r[pc->a] = r[pc->b] ^ r[pc->c]; break;
        case LOAD: r[pc->a] = memory[r[pc->b] & 1023]; break;
        case STORE: memory[r[pc->b] & 1023] = r[pc->a]; break;
        case SHIFT: r[pc->a] = r[pc->b] >> pc->c; break;
        case LESS: r[pc->a] = r[pc->b] < r[pc->c]; break;
        case JUMP_IF: if (r[pc->a]) pc = code + pc->b; break;
        case CONST: r[pc->a] = pc->b; break;
        case HALT: return r[1];
        }
    }
}
uint32_t kernel(int scale) {
    static const Code code[] = {
        {CONST, 0, 0, 0}, {CONST, 1, 1, 0}, {CONST, 2, 1, 0}, {CONST, 6, 77, 0},
        {ADD, 1, 1, 0}, {MUL, 1, 1, 6}, {XOR, 1, 1, 0}, {LOAD, 3, 1, 0}, {ADD, 1, 1, 3},
        {SHIFT, 4, 1, 5}, {STORE, 4, 1, 0}, {ADD, 0, 0, 2}, {LESS, 5, 0, 7}, {JUMP_IF, 5, 3, 0}, {HALT, 0, 0, 0}};
    return run(code, scale * 80000);
}
