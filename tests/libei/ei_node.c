/*
 * A C node of erl_interface (libei), as benchmarks hold ours against it.
 *
 *   ei_node NAME@IP COOKIE REMOTE
 *
 * Connects to the node REMOTE, prints "ready", and does what comes on standard input, a command a line. Each is answered
 * "done".
 *
 *   send COUNT SIZE   sends so many binaries of so many bytes to REMOTE's process sink, and waits for its word
 *   receive COUNT     receives so many messages, and tells REMOTE's process acks
 *   flood COUNT SIZE  as send, with frames that were encoded before: what a socket can do
 *   drain COUNT       as receive, for messages of one size, which are read and not looked at
 *
 * The port mapper is that of ERL_EPMD_PORT.
 */
/* Debian builds libei with threads: erl_errno is a function then. */
#define _REENTRANT
#include <arpa/inet.h>
#include <sys/socket.h>
#include <ei.h>
#include <ei_connect.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ei_cnode node;
static int fd;
static ei_x_buff in;

static void fail(const char *what)
{
    fprintf(stderr, "ei_node: %s failed: erl_errno %d\n", what, erl_errno);
    exit(1);
}

/* The next message that is no tick. */
static void receive(void)
{
    erlang_msg message;
    int got;
    do {
        in.index = 0;
        got = ei_xreceive_msg(fd, &message, &in);
    } while (got == ERL_TICK);
    if (got != ERL_MSG) fail("receive");
}

/* Tells the sink how many messages will come. */
static void announce(long count)
{
    ei_x_buff start;
    ei_x_new_with_version(&start);
    ei_x_encode_tuple_header(&start, 3);
    ei_x_encode_atom(&start, "start");
    ei_x_encode_pid(&start, ei_self(&node));
    ei_x_encode_long(&start, count);
    if (ei_reg_send(&node, fd, "sink", start.buff, start.index)) fail("send");
    ei_x_free(&start);
}

static void send_all(long count, long size)
{
    ei_x_buff message;
    char *bytes = calloc(1, size);
    announce(count);
    for (long i = 0; i < count; i++) {
        /* Encoded anew each time, as a program with something to say does, and as ours does. */
        if (i == 0) ei_x_new(&message);
        message.index = 0;
        ei_x_encode_version(&message);
        ei_x_encode_binary(&message, bytes, size);
        if (ei_reg_send(&node, fd, "sink", message.buff, message.index)) fail("send");
    }
    receive();
    ei_x_free(&message);
    free(bytes);
}

enum { BATCH = 64 * 1024 };

static void flood(long count, long size)
{
    ei_x_buff message;
    char *bytes = calloc(1, size);
    ei_x_new_with_version(&message);
    ei_x_encode_tuple_header(&message, 4);
    ei_x_encode_long(&message, ERL_REG_SEND);
    ei_x_encode_pid(&message, ei_self(&node));
    ei_x_encode_atom(&message, "");
    ei_x_encode_atom(&message, "sink");
    ei_x_encode_version(&message);
    ei_x_encode_binary(&message, bytes, size);
    long body = 1 + message.index, frame = 4 + body, batch = BATCH / frame + 1;
    uint32_t length = htonl(body);
    char *frames = malloc(batch * frame);
    for (long i = 0; i < batch; i++) {
        memcpy(frames + i * frame, &length, 4);
        frames[i * frame + 4] = 'p';
        memcpy(frames + i * frame + 5, message.buff, message.index);
    }
    announce(count);
    for (long left = count * frame; left > 0;) {
        long at = (count * frame - left) % (batch * frame), most = batch * frame - at;
        ssize_t sent = send(fd, frames + at, left < most ? left : most, 0);
        if (sent < 0) fail("flood");
        left -= sent;
    }
    receive();
    ei_x_free(&message);
    free(frames);
    free(bytes);
}

static void drain(long count)
{
    static char bytes[BATCH];
    uint32_t length;
    for (;;) {
        if (recv(fd, &length, 4, MSG_PEEK | MSG_WAITALL) != 4) fail("drain");
        if (length) break;
        /* A tick. */
        if (recv(fd, &length, 4, 0) != 4) fail("drain");
    }
    for (long left = count * (4L + ntohl(length)); left > 0;) {
        ssize_t got = recv(fd, bytes, left < BATCH ? left : BATCH, 0);
        if (got <= 0) fail("drain");
        left -= got;
    }
}

static void acknowledge(void)
{
    ei_x_buff done;
    ei_x_new_with_version(&done);
    ei_x_encode_atom(&done, "done");
    if (ei_reg_send(&node, fd, "acks", done.buff, done.index)) fail("send");
    ei_x_free(&done);
}

int main(int argc, char **argv)
{
    char name[256], line[256];
    struct in_addr address;
    if (argc != 4 || strlen(argv[1]) >= sizeof name) return 2;
    strcpy(name, argv[1]);
    char *host = strchr(name, '@');
    if (!host) return 2;
    *host++ = 0;
    inet_aton(host, &address);
    ei_init();
    if (ei_connect_xinit(&node, host, name, argv[1], &address, argv[2], 1) < 0) fail("init");
    if ((fd = ei_connect(&node, argv[3])) < 0) fail("connect");
    ei_x_new(&in);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        long count, size;
        if (sscanf(line, "send %ld %ld", &count, &size) == 2) send_all(count, size);
        else if (sscanf(line, "flood %ld %ld", &count, &size) == 2) flood(count, size);
        else if (sscanf(line, "receive %ld", &count) == 1) {
            while (count-- > 0) receive();
            acknowledge();
        } else if (sscanf(line, "drain %ld", &count) == 1) {
            drain(count);
            acknowledge();
        } else return 2;
        puts("done");
        fflush(stdout);
    }
    return 0;
}
