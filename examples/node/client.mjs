// Embeds images from Node.js, with calls generated from the protos at run time.
//
//   npm install && node client.mjs 127.0.0.1:50051 photo1.jpg photo2.jpg
//
// BYOL_TOKEN is sent as a bearer token; BYOL_TLS_CA names the authority of the server's certificate.
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "protos");
const definition = protoLoader.loadSync("byol/v1/byol.proto", {
  includeDirs: [protos],
  keepCase: true,
  enums: String,
  longs: Number,
});
const { Embedder } = grpc.loadPackageDefinition(definition).byol.v1;

const [address, ...files] = process.argv.slice(2);
const credentials = process.env.BYOL_TLS_CA
  ? grpc.credentials.createSsl(readFileSync(process.env.BYOL_TLS_CA))
  : grpc.credentials.createInsecure();
const client = new Embedder(address, credentials);

function call(method, request) {
  const metadata = new grpc.Metadata();
  if (process.env.BYOL_TOKEN) metadata.set("authorization", `Bearer ${process.env.BYOL_TOKEN}`);
  const options = { deadline: Date.now() + 30_000 };
  return new Promise((resolve, reject) =>
    client[method](request, metadata, options, (error, answer) =>
      error ? reject(error) : resolve(answer),
    ),
  );
}

// Tensors are packed little-endian bytes: a Float32Array over them, one row for each image.
function rows({ data, shape: [count, dim] }) {
  const values = new Float32Array(new Uint8Array(data).buffer);
  return Array.from({ length: count }, (_, i) => values.subarray(i * dim, (i + 1) * dim));
}

try {
  const encoder = await call("GetEncoder", {});
  const images = files.map((file) => readFileSync(file));
  const answer = await call("Embed", { images });
  const vectors = rows(answer.embeddings);
  const cosine = vectors[0].reduce((sum, x, i) => sum + x * vectors.at(-1)[i], 0);
  console.log(JSON.stringify({ model: encoder.model, dim: encoder.dim, count: vectors.length, cosine }));

  await call("Embed", { images: [...images, Buffer.from("no image")] }).catch((error) =>
    console.log(JSON.stringify({ refused: error.details, code: error.code })),
  );
} finally {
  client.close();
}
