// npm's ws, told of on stdout: one JSON object for each of its events. Lines of stdin are sent as text frames.
// usage: websocket.mjs URL [SUBPROTOCOL…]
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const require = createRequire(process.env.MYTHOS_NODE_MODULES + '/');
const { WebSocket } = require('ws');

const tell = (event, fields = {}) => process.stdout.write(JSON.stringify({ event, ...fields }) + '\n');

const [url, ...protocols] = process.argv.slice(2);
const socket = new WebSocket(url, protocols);
socket.on('open', () => tell('open', { protocol: socket.protocol }));
socket.on('message', (data) => tell('message', { data: data.toString() }));
socket.on('close', (code, reason) => tell('close', { code, reason: reason.toString() }));
socket.on('error', (error) => tell('error', { message: error.message }));
socket.on('unexpected-response', (request, response) => {
  let body = '';
  response.on('data', (data) => (body += data));
  response.on('end', () => tell('refused', { status: response.statusCode, body }));
});

createInterface({ input: process.stdin }).on('line', (line) => socket.send(line));
