/* An echo server on libuv: uv_try_write first, then uv_write for the rest.
 *
 * All clients share one buffer. The rest is copied, and reading stops until it is written. So nothing is left to send at
 * EOF.
 *
 * Usage: libuv PORT */

#include <stdlib.h>
#include <string.h>
#include <uv.h>

#include "listener.h"

enum { SIZE = 262144 };

struct rest {
    uv_write_t request;
    char data[];
};

static char buffer[SIZE];

static void freed(uv_handle_t *handle)
{
    free(handle);
}

static void allocate(uv_handle_t *client, size_t wanted, uv_buf_t *space)
{
    (void)client, (void)wanted;
    *space = uv_buf_init(buffer, SIZE);
}

static void received(uv_stream_t *client, ssize_t got, const uv_buf_t *space);

static void rest_sent(uv_write_t *request, int status)
{
    uv_stream_t *client = request->handle;
    free(request->data);
    if (status == 0)
        uv_read_start(client, allocate, received);
    else if (!uv_is_closing((uv_handle_t *)client))
        uv_close((uv_handle_t *)client, freed);
}

static void received(uv_stream_t *client, ssize_t got, const uv_buf_t *space)
{
    if (got == 0)
        return;
    uv_buf_t data = uv_buf_init(space->base, got);
    int sent = got < 0 ? (int)got : uv_try_write(client, &data, 1);
    if (sent == got && got > 0)
        return;
    if (sent == UV_EAGAIN)
        sent = 0;
    if (sent < 0) {
        uv_close((uv_handle_t *)client, freed);
        return;
    }
    struct rest *rest = malloc(sizeof *rest + got - sent);
    if (rest == NULL)
        die("malloc");
    rest->request.data = rest;
    memcpy(rest->data, space->base + sent, got - sent);
    data = uv_buf_init(rest->data, got - sent);
    uv_read_stop(client);
    uv_write(&rest->request, client, &data, 1, rest_sent);
}

static void connected(uv_stream_t *listener, int status)
{
    uv_tcp_t *client = malloc(sizeof *client);
    if (client == NULL)
        die("malloc");
    uv_tcp_init(listener->loop, client);
    if (status < 0 || uv_accept(listener, (uv_stream_t *)client) < 0) {
        uv_close((uv_handle_t *)client, freed);
        return;
    }
    uv_tcp_nodelay(client, 1);
    uv_read_start((uv_stream_t *)client, allocate, received);
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    raise_limit();
    uv_tcp_t listener;
    struct sockaddr_in address;
    uv_tcp_init(uv_default_loop(), &listener);
    uv_ip4_addr("127.0.0.1", atoi(arguments[1]), &address);
    uv_tcp_bind(&listener, (struct sockaddr *)&address, 0);
    if (uv_listen((uv_stream_t *)&listener, BACKLOG, connected) < 0)
        die("listen");
    signal(SIGPIPE, SIG_IGN);
    return uv_run(uv_default_loop(), UV_RUN_DEFAULT);
}
