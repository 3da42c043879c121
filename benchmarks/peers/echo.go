// An echo server on Go's net package, with one goroutine per client.
//
// Usage: echo PORT (loop | copy) [CERTIFICATE]
package main

import (
	"crypto/tls"
	"io"
	"log"
	"net"
	"os"
	"runtime"
)

const size = 65536

func loop(conn net.Conn) {
	defer conn.Close()
	buffer := make([]byte, size)
	for {
		n, err := conn.Read(buffer)
		if n > 0 {
			if _, err := conn.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// Between TCP connections, io.Copy uses splice(2). The bytes stay in the kernel, in a pipe that needs two more
// descriptors per client.
func copyAll(conn net.Conn) {
	defer conn.Close()
	io.Copy(conn, conn)
}

func main() {
	runtime.GOMAXPROCS(1)
	echo := loop
	if os.Args[2] == "copy" {
		echo = copyAll
	}
	// Go itself sets the backlog to net.core.somaxconn, raises the limit of open files, and sets TCP_NODELAY.
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	if len(os.Args) > 3 {
		certificate, err := tls.LoadX509KeyPair(os.Args[3], os.Args[3])
		if err != nil {
			log.Fatal(err)
		}
		listener = tls.NewListener(listener, &tls.Config{
			Certificates: []tls.Certificate{certificate},
			MinVersion:   tls.VersionTLS13,
		})
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go echo(conn)
	}
}
