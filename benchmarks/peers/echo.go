// An echo server on Go's net, one goroutine for each client.
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

// From one TCP connection to another, io.Copy splices: the bytes stay in the kernel, in a pipe that takes two more
// descriptors for each client.
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
	// The backlog is net.core.somaxconn, the limit of open files is the hard one and TCP_NODELAY is set: by Go itself.
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
