// npm's ws on Node's own HTTP server, with SSE by hand, as one finds it in any tutorial.
'use strict';
const http = require('http');
const { WebSocketServer, WebSocket } = require('ws');

const sockets = new Map(); // player -> Set of WebSocket
const streams = new Map(); // player -> Set of response
const rooms = new Map(); // room -> Set of player
const of = (map, key) => map.get(key) || map.set(key, new Set()).get(key);

function leave(map, player, one) {
  const all = map.get(player);
  all.delete(one);
  if (!all.size) map.delete(player);
}

function send(player, text) {
  for (const socket of sockets.get(player) || []) if (socket.readyState === WebSocket.OPEN) socket.send(text);
  for (const stream of streams.get(player) || []) stream.write(`data: ${text}\n\n`);
}

function publish({ player_id: player, channel, broadcast, message }) {
  const text = JSON.stringify(message);
  if (broadcast) for (const one of new Set([...sockets.keys(), ...streams.keys()])) send(one, text);
  else if (channel) for (const one of of(rooms, channel)) send(one, text);
  else send(player, text);
}

const welcome = (player) => JSON.stringify({ type: 'welcome', player_id: player });

function json(response, status, value) {
  const body = JSON.stringify(value);
  response.writeHead(status, { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(body) });
  response.end(body);
}

const server = http.createServer((request, response) => {
  const path = request.url.split('?')[0];
  if (path.startsWith('/sse/')) {
    const player = path.slice(5);
    response.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-cache' });
    response.write(`data: ${welcome(player)}\n\n`);
    of(streams, player).add(response);
    request.on('close', () => leave(streams, player, response));
  } else if (request.method === 'POST' && path === '/api/messages') {
    const parts = [];
    request.on('data', (part) => parts.push(part));
    request.on('end', () => {
      let publication;
      try {
        publication = JSON.parse(Buffer.concat(parts));
      } catch {
        return json(response, 400, { error: true });
      }
      publish(publication);
      json(response, 202, { ok: true });
    });
  } else json(response, path === '/health' ? 200 : 404, { status: 'healthy' });
});

const websockets = new WebSocketServer({ server });
websockets.on('connection', (socket, request) => {
  const player = request.url.split('?')[0].slice(4);
  const joined = [];
  of(sockets, player).add(socket);
  socket.send(welcome(player));
  socket.on('message', (data) => {
    const said = JSON.parse(data);
    if (said.type === 'subscribe') {
      joined.push(said.channel);
      of(rooms, said.channel).add(player);
    }
    socket.send(JSON.stringify({ type: 'reply', id: said.id, ok: true, content: said.content }));
  });
  socket.on('close', () => {
    leave(sockets, player, socket);
    for (const room of joined) of(rooms, room).delete(player);
  });
});

server.listen({ port: Number(process.env.PORT), host: '127.0.0.1', backlog: 4096 });
