// Makes a document, then parses it again and again: recursive descent over
// bytes, numbers, strings with escapes.
#include "bench.h"
static char text[1 << 17];
static int length;
static const char *at;
static void put(const char *s) { while (*s) text[length++] = *s++; }
static uint32_t value(void);
static void space(void) { while (*at == ' ' || *at == '\n') at++; }
static NOINLINE uint32_t string(void) {
    uint32_t hash = 2166136261u;
    for (at++; *at != '"'; at++) {
        if (*at == '\\') at++;
        hash = (hash ^ (uint8_t)*at) * 16777619u;
    }
    at++;
    return hash;
}
static NOINLINE uint32_t number(void) {
    double v = 0, unit = 1;
    int minus = *at == '-';
    at += minus;
    while (*at >= '0' && *at <= '9') v = v * 10 + (*at++ - '0');
    if (*at == '.') for (at++; *at >= '0' && *at <= '9'; at++) { unit /= 10; v += (*at - '0') * unit; }
    return (uint32_t)(int32_t)(minus ? -v : v);
}
static NOINLINE uint32_t list(char end) {
    uint32_t sum = 0;
    at++;
    for (space(); *at != end; space()) {
        if (end == '}') { sum += string(); space(); at++; }
        sum = sum * 31 + value();
        space();
        if (*at == ',') { at++; space(); }
    }
    at++;
    return sum;
}
static NOINLINE uint32_t value(void) {
    space();
    switch (*at) {
    case '{': return list('}');
    case '[': return list(']');
    case '"': return string();
    case 't': at += 4; return 1;
    case 'f': at += 5; return 0;
    case 'n': at += 4; return 2;
    default: return number();
    }
}
uint32_t kernel(int scale) {
    put("[");
    for (int i = 0; length < 100000; i++) {
        put(i ? ", {\"id\": " : "{\"id\": ");
        char n[2] = {'0' + i % 10, 0};
        put(n); put(n); put(".25, \"name\": \"a \\\"quoted\\\" name "); put(n);
        put("\", \"tags\": [\"x\", \"yy\", true, null, -17], \"deep\": {\"a\": {\"b\": [1, 2, 3.5]}}}");
    }
    put("]");
    uint32_t sum = 0;
    for (int n = 0; n < scale * 6; n++) { at = text; sum += value(); }
    return sum;
}
