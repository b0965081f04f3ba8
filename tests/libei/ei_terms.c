/*
 * Terms as erl_interface (libei) reads and writes them: the other side of differential tests and benchmarks.
 *
 * Requests come on standard input, replies go to standard output, each with a length of four bytes before it. It ends
 * with its input. Requests are a letter and what follows it:
 *
 *   E term     decodes the term and encodes it again; reply 1 and the bytes, or 0 if either is refused
 *   S term     reply 1 and the term's length (4 bytes) as ei_skip_term has it, or 0
 *   L term     keeps the term for the next three; reply 1 or 0
 *   W count    goes through it so many times, reading every leaf; reply nanoseconds of CPU (8 bytes)
 *   K count    skips it so many times; the same reply
 *   N count    encodes it so many times; the same reply
 *
 * It trusts its input as far as libei does: tests alone use it.
 */
#include <ei.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct node {
    int type;
    int count; /* parts, the tail of a list not counted */
    struct node *parts;
    union {
        long long small;
        double real;
        /* Apart: they hold names of a kilobyte. */
        erlang_pid *pid;
        erlang_port *port;
        erlang_ref *ref;
        erlang_fun *fun;
        erlang_big *big;
        struct { const char *bytes; size_t bits; } bits;
        struct { char *bytes; int len; } text; /* of an atom or a string */
    } u;
};

enum { SMALL, BIG, REAL, ATOM, PID, PORT, REF, FUN, BITS, STRING, NIL, LIST, TUPLE, MAP };

static void *take(size_t size)
{
    void *memory = calloc(1, size ? size : 1);
    if (!memory) abort();
    return memory;
}

static int decode(const char *buf, int *at, struct node *node);

static int decode_parts(const char *buf, int *at, struct node *node, int kind, int count, int wanted)
{
    node->type = kind;
    node->count = count;
    node->parts = take(sizeof(struct node) * wanted);
    for (int i = 0; i < wanted; i++)
        if (decode(buf, at, &node->parts[i])) return -1;
    return 0;
}

static int decode(const char *buf, int *at, struct node *node)
{
    int type, size, count;
    unsigned int offset;
    if (ei_get_type(buf, at, &type, &size)) return -1;
    switch (type) {
    case ERL_SMALL_BIG_EXT:
    case ERL_LARGE_BIG_EXT:
        if (size > 8 || ei_decode_longlong(buf, at, &node->u.small)) {
            node->type = BIG;
            node->u.big = ei_alloc_big(size);
            return ei_decode_big(buf, at, node->u.big);
        }
        node->type = SMALL;
        return 0;
    case ERL_SMALL_INTEGER_EXT:
    case ERL_INTEGER_EXT:
        node->type = SMALL;
        return ei_decode_longlong(buf, at, &node->u.small);
    case ERL_FLOAT_EXT:
    case NEW_FLOAT_EXT:
        node->type = REAL;
        return ei_decode_double(buf, at, &node->u.real);
    case ERL_ATOM_EXT:
    case ERL_SMALL_ATOM_EXT:
    case ERL_ATOM_UTF8_EXT:
    case ERL_SMALL_ATOM_UTF8_EXT: {
        char text[MAXATOMLEN_UTF8];
        node->type = ATOM;
        if (ei_decode_atom_as(buf, at, text, sizeof text, ERLANG_UTF8, NULL, NULL)) return -1;
        node->u.text.len = (int)strlen(text);
        node->u.text.bytes = take(node->u.text.len);
        memcpy(node->u.text.bytes, text, node->u.text.len);
        return 0;
    }
    case ERL_PID_EXT:
    case ERL_NEW_PID_EXT:
        node->type = PID;
        node->u.pid = take(sizeof(erlang_pid));
        return ei_decode_pid(buf, at, node->u.pid);
    case ERL_PORT_EXT:
    case ERL_NEW_PORT_EXT:
    case ERL_V4_PORT_EXT:
        node->type = PORT;
        node->u.port = take(sizeof(erlang_port));
        return ei_decode_port(buf, at, node->u.port);
    case ERL_REFERENCE_EXT:
    case ERL_NEW_REFERENCE_EXT:
    case ERL_NEWER_REFERENCE_EXT:
        node->type = REF;
        node->u.ref = take(sizeof(erlang_ref));
        return ei_decode_ref(buf, at, node->u.ref);
    case ERL_FUN_EXT:
    case ERL_NEW_FUN_EXT:
    case ERL_EXPORT_EXT:
        node->type = FUN;
        node->u.fun = take(sizeof(erlang_fun));
        return ei_decode_fun(buf, at, node->u.fun);
    case ERL_BINARY_EXT:
    case ERL_BIT_BINARY_EXT:
        node->type = BITS;
        return ei_decode_bitstring(buf, at, &node->u.bits.bytes, &offset, &node->u.bits.bits) || offset;
    case ERL_STRING_EXT:
        node->type = STRING;
        node->u.text.bytes = take(size + 1);
        node->u.text.len = size;
        return ei_decode_string(buf, at, node->u.text.bytes);
    case ERL_NIL_EXT:
        node->type = NIL;
        return ei_decode_list_header(buf, at, &count);
    case ERL_LIST_EXT:
        if (ei_decode_list_header(buf, at, &count)) return -1;
        return decode_parts(buf, at, node, LIST, count, count + 1);
    case ERL_SMALL_TUPLE_EXT:
    case ERL_LARGE_TUPLE_EXT:
        if (ei_decode_tuple_header(buf, at, &count)) return -1;
        return decode_parts(buf, at, node, TUPLE, count, count);
    case ERL_MAP_EXT:
        if (ei_decode_map_header(buf, at, &count)) return -1;
        return decode_parts(buf, at, node, MAP, count, 2 * count);
    default:
        return -1;
    }
}

static void release(struct node *node)
{
    int count = node->count;
    switch (node->type) {
    case BIG: ei_free_big(node->u.big); break;
    case FUN: free_fun(node->u.fun); /* fall through */
    case PID:
    case PORT:
    case REF: free(node->u.fun); break;
    case ATOM:
    case STRING: free(node->u.text.bytes); break;
    case LIST: count++; break;
    case MAP: count *= 2; break;
    }
    if (!node->parts) return;
    for (int i = 0; i < count; i++) release(&node->parts[i]);
    free(node->parts);
}

/* `out` NULL only counts, as in libei itself. */
static int encode(char *out, int *at, const struct node *node)
{
    int count = node->count;
    switch (node->type) {
    case SMALL: return ei_encode_longlong(out, at, node->u.small);
    case BIG: return ei_encode_big(out, at, node->u.big);
    case REAL: return ei_encode_double(out, at, node->u.real);
    case ATOM:
        return ei_encode_atom_len_as(out, at, node->u.text.bytes, node->u.text.len, ERLANG_UTF8, ERLANG_UTF8);
    case PID: return ei_encode_pid(out, at, node->u.pid);
    case PORT: return ei_encode_port(out, at, node->u.port);
    case REF: return ei_encode_ref(out, at, node->u.ref);
    case FUN: return ei_encode_fun(out, at, node->u.fun);
    case BITS: return node->u.bits.bits % 8
            ? ei_encode_bitstring(out, at, node->u.bits.bytes, 0, node->u.bits.bits)
            : ei_encode_binary(out, at, node->u.bits.bytes, (int)(node->u.bits.bits / 8));
    case STRING: return ei_encode_string_len(out, at, node->u.text.bytes, node->u.text.len);
    case NIL: return ei_encode_empty_list(out, at);
    case LIST:
        if (ei_encode_list_header(out, at, count)) return -1;
        count++;
        break;
    case TUPLE:
        if (ei_encode_tuple_header(out, at, count)) return -1;
        break;
    case MAP:
        if (ei_encode_map_header(out, at, count)) return -1;
        count *= 2;
        break;
    }
    for (int i = 0; i < count; i++)
        if (encode(out, at, &node->parts[i])) return -1;
    return 0;
}

static volatile uint64_t sink;

/* Reads every leaf and keeps nothing, borrowing where libei can (binaries). */
static int walk(const char *buf, int *at)
{
    int type, size, count;
    if (ei_get_type(buf, at, &type, &size)) return -1;
    switch (type) {
    case ERL_SMALL_INTEGER_EXT:
    case ERL_INTEGER_EXT:
    case ERL_SMALL_BIG_EXT: {
        long long value;
        if (ei_decode_longlong(buf, at, &value)) return -1;
        sink += (uint64_t)value;
        return 0;
    }
    case ERL_FLOAT_EXT:
    case NEW_FLOAT_EXT: {
        double value;
        if (ei_decode_double(buf, at, &value)) return -1;
        sink += value > 0;
        return 0;
    }
    case ERL_ATOM_EXT: {
        char text[MAXATOMLEN_UTF8];
        if (ei_decode_atom_as(buf, at, text, sizeof text, ERLANG_UTF8, NULL, NULL)) return -1;
        sink += (uint64_t)text[0];
        return 0;
    }
    case ERL_BINARY_EXT: {
        const char *bytes;
        unsigned int offset;
        size_t bits;
        if (ei_decode_bitstring(buf, at, &bytes, &offset, &bits)) return -1;
        sink += bits;
        return 0;
    }
    case ERL_STRING_EXT: {
        char text[65536];
        if (ei_decode_string(buf, at, text)) return -1;
        sink += (uint64_t)text[0];
        return 0;
    }
    case ERL_NIL_EXT:
        return ei_decode_list_header(buf, at, &count);
    case ERL_LIST_EXT:
        if (ei_decode_list_header(buf, at, &count)) return -1;
        count++;
        break;
    case ERL_SMALL_TUPLE_EXT:
    case ERL_LARGE_TUPLE_EXT:
        if (ei_decode_tuple_header(buf, at, &count)) return -1;
        break;
    case ERL_MAP_EXT:
        if (ei_decode_map_header(buf, at, &count)) return -1;
        count *= 2;
        break;
    default:
        return ei_skip_term(buf, at);
    }
    for (int i = 0; i < count; i++)
        if (walk(buf, at)) return -1;
    return 0;
}

static uint64_t now(void)
{
    struct timespec time;
    /* Of CPU: what else runs on the machine shall not count. */
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint32_t word(const unsigned char *b)
{
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

static void reply(const void *head, size_t head_len, const void *bytes, size_t len)
{
    size_t all = head_len + len;
    unsigned char size[4] = { all >> 24, all >> 16, all >> 8, all };
    fwrite(size, 1, 4, stdout);
    fwrite(head, 1, head_len, stdout);
    if (len) fwrite(bytes, 1, len, stdout);
    fflush(stdout);
}

static int term(const char *bytes, int len, struct node *root)
{
    int at = 0, version;
    memset(root, 0, sizeof *root);
    return ei_decode_version(bytes, &at, &version) || decode(bytes, &at, root) || at != len;
}

static void elapsed(uint64_t began)
{
    uint64_t nanos = now() - began;
    unsigned char bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(nanos >> (56 - 8 * i));
    reply(bytes, 8, NULL, 0);
}

int main(void)
{
    char *kept = NULL;
    struct node *root = take(sizeof *root);
    unsigned char size[4];
    while (fread(size, 1, 4, stdin) == 4) {
        uint32_t len = word(size);
        char *request = take((size_t)len + 1);
        if (len < 1 || fread(request, 1, len, stdin) != len) return 1;
        char *bytes = request + 1;
        int rest = (int)len - 1, at = 0, version;
        switch (*request) {
        case 'E': {
            struct node one;
            int size = 0;
            if (term(bytes, rest, &one) || ei_encode_version(NULL, &size) || encode(NULL, &size, &one)) {
                reply("\0", 1, NULL, 0);
            } else {
                char *out = take(size);
                if (ei_encode_version(out, &at) || encode(out, &at, &one) || at != size) return 1;
                reply("\1", 1, out, size);
                free(out);
                release(&one);
            }
            break;
        }
        case 'S':
            if (ei_decode_version(bytes, &at, &version) || ei_skip_term(bytes, &at)) {
                reply("\0", 1, NULL, 0);
            } else {
                unsigned char end[5] = { 1, at >> 24, at >> 16, at >> 8, at };
                reply(end, 5, NULL, 0);
            }
            break;
        case 'L': {
            /* The tree borrows binaries from the bytes, so both stay. */
            char *copy = take(rest);
            memcpy(copy, bytes, rest);
            if (term(copy, rest, root)) {
                reply("\0", 1, NULL, 0);
            } else {
                kept = copy;
                reply("\1", 1, NULL, 0);
            }
            break;
        }
        case 'W':
        case 'K':
        case 'N': {
            if (!kept || rest != 4) return 1;
            uint32_t count = word((unsigned char *)bytes);
            int room = 0;
            if (ei_encode_version(NULL, &room) || encode(NULL, &room, root)) return 1;
            char *out = take(room);
            /* No page of it is touched for the first time while the clock runs. */
            memset(out, 1, room);
            uint64_t began = now();
            for (uint32_t i = 0; i < count; i++) {
                int from = 0, failed = 0;
                if (*request == 'N') {
                    failed = ei_encode_version(out, &from) || encode(out, &from, root);
                    sink += (uint64_t)from;
                } else {
                    failed = ei_decode_version(kept, &from, &version) ||
                        (*request == 'W' ? walk(kept, &from) : ei_skip_term(kept, &from));
                    sink += (uint64_t)from;
                }
                if (failed) return 1;
            }
            elapsed(began);
            free(out);
            break;
        }
        default:
            return 1;
        }
        free(request);
    }
    return 0;
}
